"""The few constants that are computed."""

from vsport.constants import Feature, queue_count, rx_queue, tx_queue


def test_queue_numbers():
    """5.3.2, R-CON-02: port 0 comes before the control queues, all others after them."""
    assert [(rx_queue(port), tx_queue(port)) for port in (0, 1, 2, 30)] == [(0, 1), (4, 5), (6, 7), (62, 63)]


def test_every_queue_belongs_to_one_port_or_to_control():
    max_ports = 31
    queues = [queue(port) for port in range(max_ports) for queue in (rx_queue, tx_queue)]
    assert sorted([*queues, 2, 3]) == list(range(queue_count(max_ports)))


def test_the_highest_port_fits_vhost_users_8_bits():
    """R-VU-22."""
    assert queue_count(127) == 256


def test_feature_bits():
    """R-CON-04."""
    assert [feature.bit_length() - 1 for feature in Feature] == [0, 1, 2, 26, 28, 29, 30, 32, 34, 35]
