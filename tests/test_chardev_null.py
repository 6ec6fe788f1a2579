"""The null chardev."""

from __future__ import annotations

from chardev_peers import Rig


def test_takes_everything_and_has_nothing() -> None:
    with Rig() as rig:
        wire = rig.make("null")
        wire.open()
        assert wire.events == ["connected"]
        for _ in range(100):
            assert wire.offer(bytes(1 << 16)) == 1 << 16
        assert wire.chardev.read_fd == -1
        assert wire.chardev.describe() == "null"
