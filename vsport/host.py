"""A device with its ports and their chardevs, on a loop: what `vsport serve` runs, and any program can run.

loop = Loop()
host = Host(loop, parse_configuration(["socket,id=c0,path=/run/a.sock,server=on"], ["virtserialport,chardev=c0"]))
host.open()
loop.run()
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from vsport import chardev
from vsport.chardev.base import Chardev
from vsport.device import SerialDevice
from vsport.document import Fields
from vsport.errors import UsageError
from vsport.loop import Loop
from vsport.options import Configuration, PortOption
from vsport.parcel import Delivery, Parcel
from vsport.port import PortConfig
from vsport.pump import PortPump

__all__ = ["Host"]


class Host:
    """Makes all that ``configuration`` names; raises UsageError. It touches nothing of the machine before open().

    ``name`` is the device's in the log, where one process has many of them.
    """

    def __init__(self, loop: Loop, configuration: Configuration, name: str = "") -> None:
        self.loop = loop
        self.configuration = configuration
        self.device = SerialDevice(
            max_ports=configuration.max_ports,
            packed=configuration.packed,
            in_order=configuration.in_order,
            name=name,
        )
        self.device.on_backlog = self._again_soon
        self._backlog: set[int] = set()
        self.pumps: dict[int, PortPump] = {}
        """By port id; a port without a chardev has none."""
        self.chardevs = {
            option.id: chardev.make(option.kind, option.id, option.options) for option in configuration.chardevs
        }
        for option in sorted(configuration.ports, key=lambda option: option.nr is None):  # chosen numbers first
            self.plug(option)

    def plug(self, option: PortOption) -> int:
        """Adds a port, also while a guest runs; returns its id. Raises UsageError. The chardev is not opened here."""
        if option.nr == 0 and not option.console:
            raise UsageError("port number 0 is for a console (virtconsole): generic ports start at nr=1")
        id = self.device.free_port_id(console=option.console) if option.nr is None else option.nr
        port = self.device.add_port(
            PortConfig(id, option.name, option.console, option.cols, option.rows, option.rows_first), option.manners
        )
        if option.chardev:
            pump = self.pumps[id] = PortPump(self.loop, port, self.chardevs[option.chardev])
            self.device.attach(port, pump)
        return id

    def unplug(self, id: int) -> None:
        """Removes a port, also while a guest runs; its chardev is closed. Raises UsageError if there is none."""
        pump = self.pumps.pop(id, None)
        self.device.remove_port(id)
        if pump is not None:
            pump.close()

    def open(self) -> None:
        """Opens every chardev; raises HostError, and then none is left open."""
        try:
            for pump in self.pumps.values():
                pump.open()
        except BaseException:
            self.close()
            raise

    # -- going on in another process -----------------------------------------------------------------------------------

    @property
    def edition(self) -> Hashable:
        """As long as this is the same, give() says the same."""
        return tuple((id, pump.chardev.edition) for id, pump in self.pumps.items())

    def give(self, parcel: Parcel) -> dict[str, Any]:
        """Every open chardev, by its id, for the take() of another process. Changes nothing."""
        return {pump.chardev.id: pump.chardev.give(parcel) for pump in self.pumps.values()}

    def take(self, state: Fields, delivery: Delivery) -> None:
        """In the place of open(), with what give() said. Raises DocumentError, OSError, and then none is open."""
        try:
            for pump in self.pumps.values():
                pump.chardev.take(self.loop, pump, state.object(pump.chardev.id), delivery)
            state.end()
        except BaseException:
            self.release()
            raise

    def with_peers(self) -> set[int]:
        """The ids of the ports whose host is there."""
        return {id for id, pump in self.pumps.items() if pump.chardev.connected}

    def announce(self) -> None:
        """After take(): the guest hears of hosts that it has not heard of, and of each when it could have before."""
        for id in self.with_peers():
            port = self.device.ports[id]
            if not port.state.host_connected:
                self.pumps[id].announce_host(port)

    def release(self) -> None:
        """Every chardev is another process's now."""
        for pump in self.pumps.values():
            pump.chardev.release()

    # -- hosts ---------------------------------------------------------------------------------------------------------

    def missing_peers(self) -> list[Chardev]:
        """The chardevs that were told to wait for their first peer (wait=on) and have none yet."""
        return [
            pump.chardev for pump in self.pumps.values() if pump.chardev.waits_for_peer and not pump.chardev.connected
        ]

    def close(self) -> None:
        """Closes every chardev; safe to call twice."""
        for pump in self.pumps.values():
            pump.close()

    def _again_soon(self, index: int) -> None:
        """Kicks the queue once in the next round, however many kicks of the guest asked for that."""
        if index not in self._backlog:
            self._backlog.add(index)
            self.loop.call_soon(lambda: self._kick(index))

    def _kick(self, index: int) -> None:
        self._backlog.remove(index)
        self.device.kick(index)
