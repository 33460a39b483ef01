"""Memory of the simulated device, which finds accesses out of bounds and races."""

from collections.abc import Iterator

import numpy as np

WARP = 32
_GLOBAL_BASE = 1 << 40
_GAP = 4096  # bytes between allocations


class KernelError(Exception):
    """What a GPU would not have forgiven."""


class Races:
    """Who accessed the bytes of a memory last, and which barriers have passed since."""

    def __init__(self, size: int) -> None:
        self._writer = np.full(size, -1, np.int64)
        self._write_time = np.zeros((size, 2), np.int64)
        self._reader = np.full(size, -1, np.int64)  # of a single thread
        self._read_time = np.zeros((size, 2), np.int64)
        self._read_by_lanes = np.zeros(size, bool)
        self._read_by_warps = np.zeros(size, bool)

    def read(self, places: np.ndarray, threads: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Returns which accesses are not ordered after the write of another thread.

        Args:
            places: bytes, [threads, bytes of an access].
            threads: their numbers, distinct over all blocks.
            time: [threads, 2], barriers passed: of the warp, of the block.
        """
        bad = unordered(self._writer[places], self._write_time[places], threads, time)
        reader, then = self._reader[places], self._read_time[places]
        me, now = threads[:, None], time[:, None]
        same_warp, recent = reader // WARP == me // WARP, then[..., 1] == now[..., 1]
        known = (reader >= 0) & recent
        warps = known & (self._read_by_warps[places] | ~same_warp)
        lanes = (
            known
            & same_warp
            & (then[..., 0] == now[..., 0])
            & (self._read_by_lanes[places] | (reader != me))
        )
        self._reader[places], self._read_time[places] = me, now
        self._read_by_warps[places], self._read_by_lanes[places] = warps, lanes
        # Of threads that read the same byte at the same time, the last was written down.
        other = self._reader[places] != me
        self._read_by_lanes[places[other]] = True
        apart = other & (self._reader[places] // WARP != me // WARP)
        self._read_by_warps[places[apart]] = True
        return bad.any(axis=-1)

    def write(self, places: np.ndarray, threads: np.ndarray, time: np.ndarray) -> np.ndarray:
        """As `read`; returns which are not ordered after accesses of other threads."""
        me, now = threads[:, None], time[:, None]
        bad = unordered(self._writer[places], self._write_time[places], threads, time)
        reader, then = self._reader[places], self._read_time[places]
        bad |= unordered(reader, then, threads, time)
        in_block = (reader >= 0) & (then[..., 1] == now[..., 1])
        bad |= in_block & self._read_by_warps[places]
        bad |= in_block & self._read_by_lanes[places] & (then[..., 0] == now[..., 0])
        self._writer[places], self._write_time[places] = me, now
        bad |= self._writer[places] != me  # two threads at once
        self._reader[places] = -1
        return bad.any(axis=-1)

    def writers(self) -> np.ndarray:
        """The thread that wrote each byte last, or -1."""
        return self._writer

    def forget(self, places: np.ndarray) -> None:
        """Bytes that something other than a thread has written."""
        self._writer[places] = self._reader[places] = -1

    def hand_over(self, thread: int, time: np.ndarray) -> None:
        """What a thread knew of at that time is known to all from now on."""
        one, then = np.array([thread]), time[None]
        seen = (self._writer >= 0) & ~unordered(
            self._writer[:, None], self._write_time[:, None], one, then
        )[:, 0]
        read = (self._reader >= 0) & ~unordered(
            self._reader[:, None], self._read_time[:, None], one, then
        )[:, 0]
        self._writer[seen] = -1
        self._reader[read & ~self._read_by_warps] = -1


class Writes:
    """Who wrote the bytes of a global buffer, and which of that other blocks may read."""

    def __init__(self, size: int) -> None:
        self._writer = np.full(size, -1, np.int64)
        self._time = np.zeros((size, 2), np.int64)
        self._is_released = np.zeros(size, bool)
        self.begin_block(0)

    def begin_block(self, first_thread: int) -> None:
        """Blocks run one after the other."""
        self._first_thread = first_thread
        self._acquired = np.zeros((0, 3), np.int64)  # who has acquired what is released, and when

    def read(self, places: np.ndarray, threads: np.ndarray, time: np.ndarray) -> np.ndarray:
        """As of `Races`: what other blocks have written has to be released and acquired."""
        writer = self._writer[places]
        here = writer >= self._first_thread
        bad = here & unordered(writer, self._time[places], threads, time)
        who, when = self._acquired[:, 0], self._acquired[:, 1:]
        after = ~unordered(who[None], when[None], threads, time)
        acquired = after.any(axis=1)[:, None] & self._is_released[places]
        return (bad | ((writer >= 0) & ~here & ~acquired)).any(axis=-1)

    def write(self, places: np.ndarray, threads: np.ndarray, time: np.ndarray) -> np.ndarray:
        """As of `Races`, but only a barrier of the warp allows to write what another has."""
        warp_time = time * [1, 0]
        writer, then = self._writer[places], self._time[places] * [1, 0]
        bad = unordered(writer, then, threads, warp_time)
        bad |= (writer >= 0) & (writer // WARP != threads[:, None] // WARP)
        self._writer[places], self._time[places] = threads[:, None], time[:, None]
        self._is_released[places] = False
        bad |= self._writer[places] != threads[:, None]  # two threads at once
        return bad.any(axis=-1)

    def synchronize(self, thread: int, time: np.ndarray) -> None:
        """A thread releases what it knows of, and acquires what is released."""
        one = np.array([thread])
        known = ~unordered(self._writer[:, None], self._time[:, None], one, time[None])[:, 0]
        self._is_released |= known & (self._writer >= self._first_thread)
        self._acquired = np.vstack([self._acquired, [thread, *time]])


def unordered(
    other: np.ndarray, then: np.ndarray, threads: np.ndarray, time: np.ndarray
) -> np.ndarray:
    """Which accesses, of other threads at other times, no barrier orders before those of `threads`.

    Args:
        other: the threads that made them, [threads, bytes of an access]; -1 for none.
        then: when they did, [threads, bytes of an access, 2].
        threads: as of `Races.read`.
        time: as of `Races.read`.
    """
    me, now = threads[:, None], time[:, None]
    warp_apart = (other // WARP == me // WARP) & (then[..., 0] == now[..., 0])
    block_apart = (other // WARP != me // WARP) & (then[..., 1] == now[..., 1])
    return (other >= 0) & (other != me) & (warp_apart | block_apart)


class GlobalMemory:
    """Device memory: allocations with gaps between."""

    def __init__(self) -> None:
        self._end = _GLOBAL_BASE
        self._parts: list[tuple[int, np.ndarray, Writes | None]] = []

    def allocate(self, data: np.ndarray, offset: int = 0, writable: bool = False) -> int:
        """The address of a copy, 256 bytes aligned, and `offset` behind that."""
        at = self._end + offset
        self._parts.append(
            (at, data.view(np.uint8).reshape(-1).copy(), Writes(data.nbytes) if writable else None)
        )
        self._end = -(-(at + data.nbytes + _GAP) // 256) * 256
        return at

    def read_back(self, address: int) -> np.ndarray:
        (found,) = (part for at, part, _ in self._parts if at == address)
        return found

    def writes(self) -> list[Writes]:
        """Of all that is writable."""
        return [writes for _, _, writes in self._parts if writes]

    def find(
        self, addresses: np.ndarray
    ) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, Writes | None, np.ndarray]]]:
        """The allocations that accesses are in.

        Args:
            addresses: of all bytes, [accesses, bytes of each].

        Yields:
            Which accesses are in an allocation, its bytes, who wrote them (None if nobody may), and
            their places in it.
        """
        left = np.ones(len(addresses), bool)
        for at, part, races in self._parts:
            inside = (addresses[:, 0] >= at) & (addresses[:, -1] < at + len(part))
            if inside.any():
                places = (addresses[inside] - np.uint64(at)).astype(np.int64)
                yield inside, (part, races, places)
                left &= ~inside
        if left.any():
            raise KernelError(f"{left.sum()} accesses out of bounds, at {addresses[left][0, 0]:#x}")
