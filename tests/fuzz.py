"""Malformed input in bulk: ``python tests/fuzz.py --count 1000000 --seed 1 [--what KIND]``.

Made to run under sanitizers (``make fuzz``): each input is cheap, built from plausible parts of which some are wrong,
and compared with what the rules say. Ends at the first failure, with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fuzz_control import control_case
from fuzz_qemu_stream import qemu_stream_case
from fuzz_snapshot import snapshot_case
from fuzz_vhost_user import vhost_user_case
from raw_ring import DESC, HALF, INDIRECT, NEXT, TOP, WRAP, WRITE, RawFlight, RawPacked, RawRing
from ring_oracle import Broken, Oracle, PackedOracle, Piece

from vsport import _ring
from vsport._ring import DirtyLog, Status
from vsport.errors import FrontEndError, GuestError

# -- rings -------------------------------------------------------------------------------------------------------------

TABLE = 0x1000
"""Where indirect tables lie in the data area; two of them fill a page."""
RINGS = [RawRing(size, start=False) for size in (1, 2, 4, 8, 16)]
PACKED_RINGS = [RawPacked(size, start=False) for size in (1, 2, 3, 7, 8, 16)]
HOST = os.memfd_create("host")
BYTES = bytes(range(1, 256)) * 600
PAGE = 4096
GUARD = b"\x5a" * 16
"""What lies before and behind a dirty log."""


def address(random: random.Random, ring: RawRing) -> int:
    """Mostly where there is memory; often at its edges."""
    base = random.choice(
        (
            ring.data,
            ring.data + 0x2000,
            ring.data + 0x4000,
            ring.data + HALF - random.randrange(32),
            ring.end - random.randrange(64),
            ring.data + TABLE + 16 * random.randrange(16),
            TOP,
            (1 << 64) - 1 - random.randrange(32),
            random.choice((0, ring.avail, ring.used, 1 << 40, 1 << 63)),
        )
    )
    return min(base + random.choice((0, 0, 1, 7, 256)), (1 << 64) - 1)


def length(random: random.Random) -> int:
    return random.choice((0, 1, 2, 15, 16, 16, 32, 48, 64, 128, 1000, 5000, 0x7FFFFFFF, 0xFFFFFFFF))


def descriptors(random: random.Random, ring: RawRing, count: int, size: int) -> bytes:
    """``count`` descriptors for a table of ``size``, most of which lead to the next one."""
    table = bytearray()
    for i in range(count):
        flags = random.choice((0, 0, 0, NEXT, NEXT, NEXT, WRITE, WRITE, WRITE | NEXT, WRITE | NEXT, INDIRECT, 0))
        following = random.choice((i + 1, i + 1, i + 1, i + 1, random.randrange(size), random.randrange(0x10000)))
        if flags & INDIRECT:
            place = ring.data + TABLE + random.choice((0, 0, 256, 8))
            table += DESC.pack(place, random.choice((16, 32, 48, 64, 17, 0)), flags | random.choice((0, 0, 1, 2)), 0)
        else:
            table += DESC.pack(address(random, ring), length(random), flags, following & 0xFFFF)
    return bytes(table)


def make_ring(random: random.Random, ring: RawRing) -> None:
    """Fills the ring anew; it is not started."""
    ring.queue.stop()
    size = ring.size
    if isinstance(ring, RawPacked):
        ring.base = random.choice((0, WRAP)) | random.randrange(size)
    else:
        ring.base = random.choice((0, 1, 0x7FFF, 0xFFFF))
    ring.clear()
    for index, descriptor in enumerate(DESC.iter_unpack(descriptors(random, ring, size, size))):
        ring.put(index, *descriptor)
    for table in (0, 256):
        entries = DESC.iter_unpack(descriptors(random, ring, 16, random.choice((1, 2, 4, 16))))
        ring.put_table(ring.data + TABLE + table, entries)
    ring.memory.write(ring.data, BYTES[:512])
    heads = list(range(size))
    random.shuffle(heads)
    if random.random() < 0.2:
        heads[random.randrange(size)] = random.choice((0, size, 0xFFFF))
    ring.offer(*heads[: random.randint(0, size)])
    if isinstance(ring, RawPacked):
        for _ in range(random.choice((0, 0, 0, 0, 1, 5))):  # half a turn's flags, and what no driver writes
            ring.memory.write(16 * random.randrange(size) + 14, random.randbytes(2))
        ring.write16(ring.avail, random.randrange(0x10000))
        ring.write16(ring.avail + 2, random.randrange(5))
    elif random.random() < 0.03:
        ring.write16(ring.avail + 2, random.randrange(0x10000))


class Observed:
    """A ring's memory with a dirty log, which sometimes is too small for it: what changes is marked (R-VU-81)."""

    def __init__(self, random: random.Random, ring: RawRing) -> None:
        self.ring = ring
        size = random.choice((0, 1, 2, 4, 4, 4))
        self.memory = bytearray(GUARD + bytes(size) + GUARD)
        self.log = DirtyLog(self.memory, len(GUARD), size)
        self.used_gpa = random.choice((ring.used, ring.used, -1, random.randrange(1 << 64), (1 << 64) - 3))
        self.before = [bytes(buffer) for buffer in ring.buffers[:2]]
        ring.queue.log_to(self.log, self.used_gpa)

    def check(self) -> None:
        size = self.log.size
        assert self.memory[: len(GUARD)] == self.memory[len(GUARD) + size :] == GUARD
        marks = int.from_bytes(self.log.take(), "little")
        if self.used_gpa != self.ring.used:
            return
        before, after = b"".join(self.before), b"".join(self.ring.buffers[:2])
        for page in range(min(8 * size, len(after) // PAGE)):
            if marks >> page & 1 == 0:
                assert before[page * PAGE : (page + 1) * PAGE] == after[page * PAGE : (page + 1) * PAGE]


def make_flight(random: random.Random, ring: RawRing) -> RawFlight:
    """An in-flight region that fits the ring, or nearly, or not at all (R-VU-85 to 88)."""
    flight = RawFlight(ring.size)
    if random.random() < 0.2:
        flight.memory[:] = random.randbytes(len(flight.memory))
    if random.random() < 0.2:
        flight.put_head(version=0)
        return flight
    behind = random.choice((0, 0, 0, 1, 2, ring.size, random.randrange(0x10000)))
    flight.put_head(last=random.randrange(ring.size + 1), used_idx=ring.base - behind)
    for head in range(ring.size):
        flight.put_entry(head, next=random.choice((head + 1, random.randrange(ring.size), random.randrange(0x10000))))
    for place in range(random.randint(0, ring.size)):
        head = ring.read16(ring.avail + 4 + 2 * ((ring.base + place) % ring.size))
        if head < ring.size:
            flight.put_entry(head, inflight=1, counter=place + 7)
    if random.random() < 0.2:
        flight.memory[random.randrange(len(flight.memory))] = random.randrange(256)
    return flight


def start(random: random.Random, ring: RawRing, flight: RawFlight | None, *, indirect: bool, in_order: bool) -> None:
    """Starts the ring; a region that is refused stays as it is, and the ring starts without."""
    event_idx = random.random() < 0.5
    ring.queue.inflight = flight.region if flight else None
    before = bytes(flight.memory) if flight else b""
    try:
        ring.start(indirect=indirect, event_idx=event_idx, in_order=in_order)
    except FrontEndError as exc:
        assert exc.rule in ("R-VU-85", "R-VU-88")
        assert flight
        assert flight.memory == before
        assert not ring.queue.running
        ring.queue.inflight = None
        ring.start(indirect=indirect, event_idx=event_idx, in_order=in_order)


def check_flight(ring: RawRing, flight: RawFlight) -> None:
    """What is in flight after any work is in flight for the next device, too."""
    heads = flight.in_flight()
    offered = [ring.read16(ring.avail + 4 + 2 * ((ring.queue.next_avail + i) % ring.size)) for i in range(len(heads))]
    assert heads == offered
    assert heads or not ring.queue.offset
    assert flight.head[4] == ring.queue.used_idx


def oracle_of(ring: RawRing, *, indirect: bool) -> Oracle:
    return PackedOracle(ring, indirect=indirect) if ring.packed else Oracle(ring, indirect=indirect)


def check_used(ring: RawRing, used: list[tuple[int, int]]) -> None:
    """These chains were returned, and no other; in order, one entry may stand for several."""
    assert ring.queue.chains - ring.chains_before == len(used)
    if not ring.in_order:
        assert ring.used_elements() == used


def expected(oracle: Oracle, *, writable: bool) -> tuple[list[tuple[int, list[Piece]]], str]:
    """The chains before the first broken one, and the rule that that one breaks."""
    chains: list[tuple[int, list[Piece]]] = []
    try:
        for chain in oracle.chains(writable=writable):
            chains.append(chain)
    except Broken as exc:
        return chains, exc.rule
    return chains, ""


def rule_of(call: Callable[[], object]) -> str:
    """The rule that the call says was broken, or nothing."""
    try:
        call()
    except GuestError as exc:
        return exc.rule
    return ""


def drain_to_file(ring: RawRing, indirect: bool) -> None:
    """Every byte before the first fault arrives, and no other."""
    oracle = oracle_of(ring, indirect=indirect)
    chains, rule = expected(oracle, writable=False)
    os.ftruncate(HOST, 0)
    os.lseek(HOST, 0, os.SEEK_SET)
    assert rule_of(lambda: ring.queue.drain(HOST, budget=1 << 24)) == rule
    data = b"".join(oracle.read(gpa, size) for _, pieces in chains for gpa, size in pieces)
    assert os.pread(HOST, len(data) + 1, 0) == data
    check_used(ring, [(head, 0) for head, _ in chains])


def discard(ring: RawRing, indirect: bool) -> None:
    chains, rule = expected(oracle_of(ring, indirect=indirect), writable=False)
    before = ring.queue.bytes_discarded
    assert rule_of(ring.queue.discard) == rule
    assert ring.queue.bytes_discarded - before == sum(size for _, pieces in chains for _, size in pieces)
    check_used(ring, [(head, 0) for head, _ in chains])


def fill_from(ring: RawRing, indirect: bool) -> None:
    """Bytes go into the offered pieces, in order, and nowhere else."""
    oracle = oracle_of(ring, indirect=indirect)
    chains, rule = expected(oracle, writable=True)
    if any(gpa < ring.data + 0x2000 for _, pieces in chains for gpa, _ in pieces):
        return anything(ring, indirect)  # the driver has its own ring overwritten
    image = bytearray(oracle.low + oracle.top)
    used, done = [], 0
    for head, pieces in chains:
        start = done
        for gpa, size in pieces:
            place = gpa if gpa < TOP else gpa - TOP + len(oracle.low)
            image[place : place + size] = BYTES[done : done + size]
            done += size
        used.append((head, done - start))
    assert done <= len(BYTES)
    assert rule_of(lambda: ring.queue.fill_from(BYTES)) == rule
    check_used(ring, used)
    after = b"".join(ring.buffers)
    drivers = slice(ring.avail if ring.packed else 0, ring.used)  # both sides write to packed descriptors
    assert after[drivers] == image[drivers]
    assert after[ring.data :] == image[ring.data :]
    return None


def anything(ring: RawRing, indirect: bool) -> None:
    """Every operation, on whatever the ones before left: a GuestError at most, and the end is reached."""
    queue = ring.queue
    with open("/dev/zero", "rb", buffering=0) as zeros:
        for call in (
            lambda: queue.pop(16),
            lambda: queue.drain_into(lambda view: len(bytes(view[:5])), budget=20),
            queue.return_partial,
            lambda: queue.push(b"12345678"),
            lambda: queue.fill(zeros.fileno(), budget=300),
            queue.pending,
            queue.kicks_on,
            queue.notify,
            lambda: queue.drain_into(len),
        ):
            rule_of(call)
    assert queue.running or queue.drain_into(len) is Status.STOPPED


def ring(random: random.Random) -> None:
    """One malformed ring, and one thing that is done with it."""
    one_ring(random, random.choice(RINGS))


def packed_ring(random: random.Random) -> None:
    """The same with a packed one."""
    one_ring(random, random.choice(PACKED_RINGS))


def one_ring(random: random.Random, made: RawRing) -> None:
    make_ring(random, made)
    indirect, in_order = random.random() < 0.9, random.random() < 0.3
    flight = make_flight(random, made) if not made.packed and random.random() < 0.3 else None
    observed = Observed(random, made) if random.random() < 0.3 else None
    start(random, made, flight, indirect=indirect, in_order=in_order)
    drivers = made.memory.read(0, made.used)
    random.choice((drain_to_file, discard, fill_from, anything))(made, indirect)
    if observed:
        observed.check()
        made.queue.log_to(None)
    if flight and made.queue.inflight and made.memory.read(0, made.used) == drivers:
        check_flight(made, flight)


# -- the command -------------------------------------------------------------------------------------------------------

GENERATORS: dict[str, Callable[[random.Random], object]] = {
    "ring": ring,
    "packed-ring": packed_ring,
    "control": control_case,
    "vhost-user": vhost_user_case,
    "qemu-stream": qemu_stream_case,
    "snapshot": snapshot_case,
}
"""Each makes one input from the given source of chance, feeds it, and raises if the outcome is wrong."""


EXTENSION = ("ring", "packed-ring", "control", "vhost-user")
"""What reaches compiled code, and so is worth a sanitizer: the kinds that are run unless one is named."""


def run(what: str, count: int, seed: int) -> None:
    """``count`` inputs, each with its own seed, so that the one that failed can be repeated alone."""
    generate = GENERATORS[what]
    chance = random.Random()
    began = told = time.monotonic()
    for i in range(count):
        chance.seed(seed + i)
        try:
            generate(chance)
        except BaseException:
            print(f"\n{what}: failed; repeat with --what {what} --count 1 --seed {seed + i}", file=sys.stderr)
            raise
        if time.monotonic() - told > 1:
            told = time.monotonic()
            print(f"\r{what}: {i + 1} of {count}, {(i + 1) / (told - began):.0f} a second ", end="", file=sys.stderr)
    print(f"\r{what}: {count} inputs from seed {seed} on, no failure, {time.monotonic() - began:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--what", choices=GENERATORS, help="one kind only")
    parser.add_argument("--sanitized", action="store_true", help="refuse to run on an extension without sanitizers")
    options = parser.parse_args()
    if options.sanitized and b"__asan_init" not in Path(_ring.__file__).read_bytes():
        parser.error(f"{_ring.__file__} was built without AddressSanitizer")
    for what in [options.what] if options.what else EXTENSION:
        run(what, options.count, options.seed)


if __name__ == "__main__":
    main()
