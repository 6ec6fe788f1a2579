"""A simulated guest, a device and real host programs on one loop: what many tests start from."""

import contextlib
import socket
from pathlib import Path

from vsport.host import Host
from vsport.loop import Loop
from vsport.options import parse_configuration
from vsport.sim import LINUX, Direct, SimulatedGuest

PATIENCE = 10.0


class World:
    """``chardevs`` and ``devices`` as on the command line; the guest has booted and its ports are there."""

    def __init__(self, chardevs, devices, *, profile=LINUX, queue_size=32, features=None):
        self.loop = Loop()
        self.host = Host(self.loop, parse_configuration(chardevs, devices))
        self.device = self.host.device
        self.guest = SimulatedGuest(Direct(self.device), profile=profile, queue_size=queue_size, features=features)
        self.guest.on_interrupt = lambda: self.loop.call_soon(self.guest.run)
        self.host.open()
        self.guest.boot()

    def close(self):
        self.host.close()
        self.loop.close()

    def wait(self, condition, what="the condition"):
        assert self.loop.run_until(condition, PATIENCE), f"not within {PATIENCE} s: {what}"

    def port(self, name):
        return self.guest.port(name)

    def read(self, port, size):
        """Exactly ``size`` bytes, as a program in the guest reads them."""
        data = bytearray()

        def enough():
            with contextlib.suppress(BlockingIOError):
                while len(data) < size and (piece := port.read(size - len(data))):
                    data.extend(piece)
            return len(data) >= size

        self.wait(enough, f"{size} bytes for the guest, {len(data)} came")
        return bytes(data)

    def write(self, port, data):
        """All of ``data``, as a program in the guest writes it."""
        left = memoryview(data)

        def done():
            nonlocal left
            with contextlib.suppress(BlockingIOError):
                while left:
                    left = left[port.write(bytes(left[:65536])) :]
            return not left

        self.wait(done, f"room for {len(data)} bytes of the guest")

    def receive(self, sock, size):
        """Exactly ``size`` bytes, as a program on the host reads them."""
        sock.setblocking(False)
        data = bytearray()

        def enough():
            with contextlib.suppress(BlockingIOError):
                while len(data) < size and (piece := sock.recv(min(65536, size - len(data)))):
                    data.extend(piece)
            return len(data) >= size

        self.wait(enough, f"{size} bytes for the host")
        return bytes(data)


def unix_client(path: Path):
    """A host program, connected; raises BlockingIOError if so many wait there already that it would have to, too."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(str(path))
    except BlockingIOError:
        sock.close()
        raise
    sock.setblocking(True)
    return sock


def unix_chardev(number, path):
    return f"socket,id=c{number},path={path},server=on,wait=off"


def generic_port(number):
    return f"virtserialport,chardev=c{number},name=org.test.{number},nr={number}"
