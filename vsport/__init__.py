"""vsport: a virtio-serial device outside the VMM, whose ports survive the move."""
