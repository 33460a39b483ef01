"""Bulk copies, the barriers that they arrive at, and bulk stores of a block of `ptx_machine.py`.

Copies arrive when a thread waits for their barrier's phase, no sooner; until then their target
holds random bytes. Stores read shared memory when the thread that made them waits for that. What
threads have stored to shared memory, and no fence has followed, copies and stores must not touch;
nor barriers that are not. A barrier's next phase must not begin where another thread may wait for
the former.
"""

import dataclasses
import re
from typing import Any

import numpy as np
from device_memory import KernelError, unordered
from ptx_arithmetic import TYPES
from ptx_kernel import SHARED_BASE, Instruction, parse_address

# How tests write down a tensor map: address, tiles, rows and bytes from row to row of a matrix of
# two-byte elements in tiles of 64 columns; tiles of a box, which has 16 rows and a swizzle of 128.
MAP_WORDS, TILE_BYTES, BOX_ROWS = 5, 128, 16


@dataclasses.dataclass
class _Barrier:
    phase: int = 0
    expected: int | None = None  # bytes of this phase, once a thread has arrived
    arrived: tuple[int, np.ndarray] | None = None  # who did without bytes, and when
    copies: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    waited: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # by thread: when

    @property
    def is_complete(self) -> bool:
        return self.expected == sum(len(data) for _, data in self.copies)


class Bulk:
    """What is under way in a block.

    Args:
        block: the block, a `ptx_machine._Block`.
    """

    def __init__(self, block: Any) -> None:
        self.block = block
        self.barriers: dict[int, _Barrier] = {}
        self.unfenced = np.zeros(len(block.shared), bool)
        self.stores: dict[int, list[list[tuple[np.ndarray, np.ndarray]]]] = {}  # by thread: groups

    def execute(self, step: Instruction, active: np.ndarray) -> np.ndarray:
        """Runs an instruction; returns which of the threads have to wait."""
        kind = ".".join(step.name)
        none = active[:0]
        if kind.startswith("fence.proxy.async"):
            self.unfenced &= ~np.isin(self.block.races.writers(), self.block.thread[active])
        elif kind.startswith("mbarrier.init"):
            for thread in active:
                address = self.address(step.operands[0], thread)
                self.barriers[address] = _Barrier()
                place = address - SHARED_BASE
                self.block.write_bytes(
                    "shared",
                    np.arange(place, place + 8)[None],
                    np.array([thread]),
                    np.zeros((1, 8), np.uint8),
                )
        elif kind.startswith("mbarrier.arrive.expect_tx"):
            for thread in active:
                barrier = self.barriers[self.address(step.operands[1], thread)]
                if barrier.expected is not None:
                    raise KernelError("a second arrival in one phase")
                if self.may_wait(barrier, thread):
                    raise KernelError("a phase begins while a thread may wait for the former")
                barrier.expected = int(self.value(step.operands[2], thread))
            self.block.waiting[:] = False
        elif kind.startswith("mbarrier.arrive"):
            for thread in active:
                barrier = self.barriers[self.address(step.operands[1], thread)]
                if barrier.expected is not None:
                    raise KernelError("a second arrival in one phase")
                barrier.expected = 0
                barrier.arrived = self.block.thread[thread], self.block.time[thread].copy()
            self.block.waiting[:] = False
        elif kind.startswith(("mbarrier.try_wait", "mbarrier.test_wait")):
            return self.try_wait(step, active)
        elif kind.startswith("cp.async.bulk.tensor"):
            for thread in active:
                self.store_box(step, int(thread))
        elif kind.startswith("cp.async.bulk.commit_group"):
            for thread in active:
                self.stores.setdefault(int(thread), [[]]).append([])
        elif kind.startswith("cp.async.bulk.wait_group"):
            for thread in active:
                self.wait_for_stores(int(thread), int(step.operands[0]))
        elif kind.startswith("cp.async.bulk.prefetch"):
            for thread in active:
                self.read(step.operands[0], int(self.value(step.operands[1], thread)), thread)
        elif kind.startswith("cp.async.bulk.shared"):
            for thread in active:
                self.copy(step, int(thread))
            self.block.waiting[:] = False
        return none

    def value(self, operand: str, thread: int) -> Any:
        number = self.block.get(operand, np.array([thread]), TYPES["u32"])
        return np.broadcast_to(number, 1)[0]

    def address(self, operand: str, thread: int) -> int:
        """An address that is in brackets."""
        name, offset = parse_address(operand)
        number = self.block.get(name, np.array([thread]), None)
        return int(np.broadcast_to(number, 1)[0]) + offset

    def places(self, address: int, size: int) -> np.ndarray:
        place = address - SHARED_BASE
        if address % 16 or size % 16 or place < 0 or place + size > len(self.block.shared):
            raise KernelError(f"bulk access of {size} bytes at {address:#x} of shared memory")
        return np.arange(place, place + size)

    def copy(self, step: Instruction, thread: int) -> None:
        size = int(self.value(step.operands[2], thread))
        to = self.places(self.address(step.operands[0], thread), size)
        data = self.read(step.operands[1], size, thread)
        self.touch(to)
        one = np.array([thread])
        time = self.block.time[one]
        if self.block.races.write(to[None], self.block.thread[one], time).any():
            raise KernelError("race: copies to shared memory that a thread accesses")
        self.block.races.forget(to)
        self.block.shared[to] = self.block.rng.integers(0, 256, size, np.uint8)
        barrier = self.address(step.operands[3], thread)
        self.touch(np.arange(barrier, barrier + 8) - SHARED_BASE)
        self.barriers[barrier].copies.append((to, data))

    def read(self, operand: str, size: int, thread: int) -> np.ndarray:
        """Bytes of global memory."""
        source = self.address(operand, thread)
        if source % 16 or size % 16:
            raise KernelError(f"bulk copy of {size} bytes from {source:#x} is not aligned")
        data = np.empty(size, np.uint8)
        addresses = np.array([source], np.uint64)[:, None] + np.arange(size, dtype=np.uint64)
        for _, (part, _, found) in self.block.memory.find(addresses):
            data[:] = part[found[0]]
        return data

    def touch(self, places: np.ndarray) -> None:
        if self.unfenced[places].any():
            raise KernelError("no fence between a thread's store and a bulk access")

    def try_wait(self, step: Instruction, active: np.ndarray) -> np.ndarray:
        waiting = []
        for thread in active:
            barrier = self.barriers[self.address(step.operands[1], thread)]
            parity = int(self.value(step.operands[2], thread))
            if barrier.phase % 2 == parity and barrier.is_complete:
                for to, data in barrier.copies:
                    self.block.shared[to] = data
                barrier.phase, barrier.expected, barrier.copies = barrier.phase + 1, None, []
                if barrier.arrived:
                    self.block.races.hand_over(*barrier.arrived)
                    barrier.arrived = None
            if barrier.phase % 2 == parity:
                waiting.append(thread)
            else:
                barrier.waited[int(thread)] = self.block.time[thread].copy()
                self.block.put(step.operands[0], np.array([thread]), np.array([True]))
        return np.array(waiting, active.dtype)

    def may_wait(self, barrier: _Barrier, thread: int) -> bool:
        """Whether nothing orders another thread's last wait before what this one does now."""
        if not barrier.waited:
            return False
        others = self.block.thread[np.array(list(barrier.waited))][None]
        then = np.stack(list(barrier.waited.values()))[None]
        one = np.array([thread])
        return bool(unordered(others, then, self.block.thread[one], self.block.time[one]).any())

    def store_box(self, step: Instruction, thread: int) -> None:
        name = r"\s*([%\w]+)\s*"
        pattern = rf"\[{name},\s*\{{{name},{name},{name}\}}\s*\]"
        match = re.fullmatch(pattern, step.operands[0])
        one = np.array([thread])
        at = int(self.block.get(match[1], one, None)[0]) - self.block.PARAM_BASE
        words = self.block.param[at : at + 8 * MAP_WORDS].view(np.uint64)
        base, tiles, rows, pitch, box_tiles = words
        col, tile, row = (int(self.value(match[i], thread)) for i in (2, 3, 4))
        if col:
            raise KernelError("a box does not begin where a tile does")
        source = self.address(step.operands[1], thread)
        box_row = TILE_BYTES * int(box_tiles)
        places = self.places(source, box_row * BOX_ROWS)
        self.touch(places)
        inside = source + np.arange(len(places))
        swizzled = inside ^ (inside >> 7 & 7) << 4
        r, c = np.divmod(np.arange(len(places)), box_row)
        kept = (row + r < int(rows)) & (tile + c // TILE_BYTES < int(tiles))
        to = np.uint64(base) + ((row + r) * int(pitch) + TILE_BYTES * tile + c).astype(np.uint64)
        source_places = swizzled[kept] - SHARED_BASE
        if self.block.races.read(source_places[None], self.block.thread[one], self.block.time[one]):
            raise KernelError("race: stores shared memory that another thread has written")
        groups = self.stores.setdefault(thread, [[]])
        groups[-1].append((source_places, to[kept]))

    def wait_for_stores(self, thread: int, left: int) -> None:
        groups = self.stores.get(thread, [[]])
        one = np.array([thread])
        while len(groups) - 1 > left:
            for places, to in groups.pop(0):
                if self.block.races.read(
                    places[:, None],
                    self.block.thread[one].repeat(len(places)),
                    self.block.time[one].repeat(len(places), 0),
                ).any():
                    raise KernelError("race: a store reads shared memory that a thread writes")
                data = self.block.shared[places]
                for inside, (part, writes, found) in self.block.memory.find(to[:, None]):
                    threads = self.block.thread[one].repeat(len(found))
                    if writes.write(
                        found, threads, self.block.time[one].repeat(len(found), 0)
                    ).any():
                        raise KernelError("race: stores where another thread has written")
                    part[found[:, 0]] = data[inside]

    def end(self) -> None:
        if any(len(groups) > 1 or groups[0] for groups in self.stores.values()):
            raise KernelError("a block ends before its stores")
        if any(b.copies or b.expected for b in self.barriers.values()):
            raise KernelError("a block ends before its copies")
