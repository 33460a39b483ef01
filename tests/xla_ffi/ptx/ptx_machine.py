"""Runs a CUDA kernel on a CPU from its PTX, a block at a time, and checks what it does.

The emulation in tests/xla_ffi/emulation compiles the kernels' source with a C++ compiler. This runs
what nvcc made of it, inline PTX included, as "Parallel Thread Execution ISA" (NVIDIA) describes it.
All threads of a block go on together, each operation on vectors of one element a thread; of threads
that have diverged, those at the first instruction go on. It stops with an error where a GPU would
fault, hang, or might give other results another time:

- an access outside of an allocation, or that is not aligned;
- a warp-wide instruction that not all of the lanes it names come to;
- an access to shared memory, or a store to global memory, that no barrier orders after another
  thread's access to the same byte.

Memory and registers that nothing has been written to hold random numbers. Only what our kernels
use of PTX is implemented.
"""

import functools
import re
from typing import Any

import numpy as np
from device_memory import WARP, GlobalMemory, KernelError, Races
from ptx_arithmetic import COMPARISONS, TYPES, compute, multiply_add_tile, to_bfloat16x2
from ptx_bulk import Bulk
from ptx_kernel import SHARED_BASE, Instruction, Kernel, names_in, parse_address


def launch(
    kernel: Kernel,
    memory: GlobalMemory,
    param: bytes,
    *,
    blocks: int,
    threads: int,
    dynamic_shared: int = 0,
    seed: int = 0,
) -> None:
    """Runs a kernel, block after block.

    Args:
        kernel: what to run.
        memory: the device's.
        param: its only parameter.
        blocks: of the grid.
        threads: of a block.
        dynamic_shared: bytes.
        seed: of what is in registers and in shared memory.

    Raises:
        KernelError: see the top.
    """
    assert len(param) == kernel.param_bytes, (len(param), kernel.param_bytes)
    shared = kernel.static_shared + dynamic_shared
    for block in range(blocks):
        _Block(kernel, memory, param, block, blocks, threads, shared, seed + block).run()


@functools.cache
def parse_number(text: str, kind: np.dtype | None) -> Any:
    """A number in the code, read as `kind`; None for a predicate. 0f...: the bits of a float."""
    return as_kind(int(text[2:], 16) if text.startswith("0f") else int(text, 0), kind)


def as_kind(number: int, kind: np.dtype | None) -> Any:
    """An integer, as many bits of it as `kind` has."""
    if kind is None:
        return np.bool_(number)
    bits = number & (2 ** (8 * kind.itemsize) - 1)
    return np.array(bits, np.dtype(f"u{kind.itemsize}")).view(kind)


@functools.cache
def register_type(name: str) -> np.dtype:
    """Of what a register holds; those of PTX have a letter or two and a number."""
    prefix = re.match(r"%?([a-z]+)", name)[1]
    types = {"rs": np.uint16, "r": np.uint32, "rd": np.uint64, "f": np.uint32}
    return np.dtype(types.get(prefix, np.bool_))


@functools.cache
def access_of(name: tuple[str, ...]) -> tuple[str, np.dtype, int]:
    """Of a load's or store's name: the space, the type and the number of elements."""
    space = next((s for s in name if s in ("param", "shared", "global")), "generic")
    count = next((int(s[1:]) for s in name if s in ("v2", "v4")), 1)
    return space, TYPES[name[-1]], count


@functools.cache
def operand_types(name: tuple[str, ...], count: int) -> list[np.dtype]:
    """Of an arithmetic instruction's operands."""
    types = [TYPES[name[-1]]] * count
    if name[0] in ("shl", "shr"):
        types[1] = TYPES["u32"]
    elif name[0] == "bfi":
        types[2:] = [TYPES["u32"]] * 2
    return types


_WIDE = frozenset(("bar", "barrier", "shfl", "vote", "redux", "elect", "mma"))


class _Block:
    PARAM_BASE = 1 << 32  # generic address of the first byte of parameters

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        param: bytes,
        block: int,
        blocks: int,
        threads: int,
        shared: int,
        seed: int,
    ) -> None:
        self.kernel, self.memory, self.size = kernel, memory, threads
        self.rng = np.random.default_rng(seed)
        self.shared = self.rng.integers(0, 256, shared, np.uint8)
        self.races = Races(shared)
        self.param = np.frombuffer(param, np.uint8)
        self.registers: dict[str, np.ndarray] = {}
        every = np.ones(threads, np.uint32)
        self.special = {
            "%tid.x": np.arange(threads, dtype=np.uint32),
            "%ctaid.x": every * block,
            "%nctaid.x": every * blocks,
            "%ntid.x": every * threads,
        }
        self.thread = np.arange(threads) + block * threads
        self.time = np.zeros((threads, 2), np.int64)
        self.pc = np.zeros(threads, np.int64)
        self.waiting = np.zeros(threads, bool)
        self.exited = np.zeros(threads, bool)
        self.bulk = Bulk(self)
        self.copies: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # under way

    def run(self) -> None:
        for writes in self.memory.writes():
            writes.begin_block(int(self.thread[0]))
        while not self.exited.all():
            ready = ~self.exited & ~self.waiting
            if not ready.any():
                stuck = sorted({self.kernel.code[pc].line for pc in self.pc[~self.exited]})
                raise KernelError(f"all threads wait, at lines {stuck}")
            pc = self.pc[ready].min()
            group = (self.pc == pc) & ~self.exited
            self.waiting[group] = False
            later = self.pc[ready & ~group]
            stop = int(later.min()) if later.size else len(self.kernel.code)
            try:
                self.go_on(group, int(pc), stop)
            except KernelError as error:
                raise KernelError(f"line {self.kernel.code[self.now].line}: {error}") from None
        self.bulk.end()

    def go_on(self, group: np.ndarray, pc: int, stop: int) -> None:
        """Runs a group of threads until it branches, waits, or meets others."""
        code = self.kernel.code
        lanes = np.flatnonzero(group)
        every = len(lanes) == self.size
        while True:
            self.now, step = pc, code[pc]
            active = lanes
            if step.guard:
                taken = self.get(step.guard, lanes) ^ step.negated
                active = lanes[taken]
            kind = step.name[0]
            pc += 1
            if kind == "bra":
                self.pc[lanes] = pc
                self.pc[active] = self.kernel.labels[step.operands[0]]
                return
            if kind in ("ret", "exit"):
                self.pc[lanes] = pc
                self.exited[active] = True
                return
            if kind in _WIDE:
                self.synchronize(step, active, pc)
                return
            if kind in ("mbarrier", "fence") or step.name[:3] == ("cp", "async", "bulk"):
                waiting = self.bulk.execute(step, active)
                if len(waiting):
                    self.pc[lanes] = pc
                    self.pc[waiting], self.waiting[waiting] = pc - 1, True
                    return
            elif len(active):
                whole = every and len(active) == self.size
                self.execute(step, slice(None) if whole else active, active)
            if pc >= stop:
                self.pc[lanes] = pc
                return

    # Operands.

    def register(self, name: str) -> np.ndarray:
        if name not in self.registers:
            rubbish = self.rng.integers(2**63, size=self.size)
            self.registers[name] = rubbish.astype(register_type(name))
        return self.registers[name]

    def get(self, name: str, where: Any, kind: np.dtype | None = None) -> Any:
        """The operand's values, read as `kind`."""
        register = self.registers.get(name)
        if register is None:
            if name in self.special:
                return self.special[name][where]
            if not name.startswith("%") and name not in ("crossed", "elected", "complete"):
                number = self.kernel.symbols.get(name)
                return parse_number(name, kind) if number is None else as_kind(number, kind)
            register = self.register(name)
        value = register[where]
        if kind is None or kind == value.dtype:
            return value
        if kind.itemsize == value.itemsize:
            return value.view(kind)
        return value.astype(np.dtype(f"u{kind.itemsize}")).view(kind)

    def put(self, name: str, where: Any, value: Any) -> None:
        if name != "_":
            if value.dtype.kind == "f":  # registers hold bits
                value = value.view(np.uint32)
            if name not in self.registers and isinstance(where, slice):  # all threads write it
                self.registers[name] = np.empty(self.size, register_type(name))
            self.register(name)[where] = value

    # Memory.

    def access(self, step: Instruction, active: np.ndarray) -> None:
        load = step.name[0] == "ld"
        space, kind, count = access_of(step.name)
        values, address = step.operands if load else step.operands[::-1]
        if space == "generic":
            register, _ = parse_address(address)
            space = "shared" if (self.get(register, active) < self.PARAM_BASE).all() else "global"
        registers = names_in(values)
        places = self.bytes_of(address, active, space, kind.itemsize * count)
        if load:
            data = (
                self.read_bytes(space, places, active, "nc" in step.name)
                .view(kind)
                .reshape(len(active), count)
            )
            for i, name in enumerate(registers):
                self.put(name, active, data[:, i])
        else:
            columns = [
                np.broadcast_to(self.get(name, active, kind), len(active)) for name in registers
            ]
            data = np.ascontiguousarray(np.stack(columns, axis=1)).view(np.uint8)
            self.write_bytes(space, places, active, data.reshape(len(active), -1))

    def bytes_of(self, operand: str, active: np.ndarray, space: str, size: int) -> np.ndarray:
        """Addresses of all bytes of an access, [active, size]; places, outside of global memory."""
        name, offset = parse_address(operand)
        address = np.full(len(active), offset, np.int64).view(np.uint64)
        if name.startswith("%"):
            address += self.get(name, active)
        else:
            address += np.uint64(self.kernel.symbols[name])
        if (address % np.uint64(size)).any():
            raise KernelError(f"access of {size} bytes at {address[0]:#x} is not aligned")
        if space == "global":
            return address[:, None] + np.arange(size, dtype=np.uint64)
        place = address.astype(np.int64) - (SHARED_BASE if space == "shared" else 0)
        limit = len(self.shared) if space == "shared" else len(self.param)
        if (place < 0).any() or (place + size > limit).any():
            raise KernelError(f"access out of bounds of {space} memory")
        return place[:, None] + np.arange(size)

    def read_bytes(
        self, space: str, places: np.ndarray, active: np.ndarray, is_constant: bool = False
    ) -> np.ndarray:
        if space == "param":
            return self.param[places]
        if space == "shared":
            if self.races.read(places, self.thread[active], self.time[active]).any():
                raise KernelError("race: reads shared memory that another thread has written")
            return self.shared[places]
        out = np.empty(places.shape, np.uint8)
        for inside, (part, writes, found) in self.memory.find(places):
            threads = active[inside]
            if writes and is_constant:
                raise KernelError("reads as a constant what may be written")
            if writes and writes.read(found, self.thread[threads], self.time[threads]).any():
                raise KernelError("race: reads global memory that another thread has written")
            out[inside] = part[found]
        return out

    def write_bytes(
        self, space: str, places: np.ndarray, active: np.ndarray, data: np.ndarray
    ) -> None:
        if space == "shared":
            if self.races.write(places, self.thread[active], self.time[active]).any():
                raise KernelError("race: writes shared memory that another thread has accessed")
            self.shared[places] = data
            self.bulk.unfenced[places] = True
            return
        for inside, (part, writes, found) in self.memory.find(places):
            if writes is None:
                raise KernelError("writes memory that is only to be read")
            threads = active[inside]
            if writes.write(found, self.thread[threads], self.time[threads]).any():
                raise KernelError("race: writes global memory that another thread has written")
            part[found] = data[inside]

    def add_in_order(self, step: Instruction, active: np.ndarray) -> None:
        """Atomic additions that release and acquire, one after the other."""
        for one in np.split(active, len(active)):
            (place,) = self.memory.find(self.bytes_of(step.operands[1], one, "global", 4))
            _, (part, _, found) = place
            number = part[found[0]].view(np.uint32)
            part[found[0]] = (number + self.get(step.operands[2], one, TYPES["u32"])).view(np.uint8)
            self.put(step.operands[0], one, number)
            for writes in self.memory.writes():
                writes.synchronize(int(self.thread[one][0]), self.time[one][0])

    # Instructions.

    def execute(self, step: Instruction, where: Any, active: np.ndarray) -> None:
        name, ops = step.name, step.operands
        kind = name[0]
        if kind in ("ld", "st"):
            self.access(step, active)
        elif kind == "cp":
            self.copy_async(step, active)
        elif kind == "prefetch":
            pass
        elif kind == "setp":
            a, b = (self.get(o, where, TYPES[name[2]]) for o in ops[1:3])
            self.put(ops[0], where, COMPARISONS[name[1]](a, b))
        elif kind == "selp":
            a, b = (self.get(o, where, TYPES[name[1]]) for o in ops[1:3])
            self.put(ops[0], where, np.where(self.get(ops[3], where), a, b))
        elif kind == "mov" and ops[0].startswith("{"):
            value = self.get(ops[1], where, np.dtype(np.uint64))
            low, high = names_in(ops[0])
            self.put(low, where, value & np.uint64(2**32 - 1))
            self.put(high, where, value >> np.uint64(32))
        elif kind == "mov" and ops[1].startswith("{"):
            low, high = (
                self.get(o, where, np.dtype(np.uint32)).astype(np.uint64) for o in names_in(ops[1])
            )
            self.put(ops[0], where, low | high << np.uint64(32))
        elif kind == "cvta":
            base = np.uint64(self.PARAM_BASE if "param" in name else 0)
            self.put(ops[0], where, self.get(ops[1], where, TYPES["u64"]) + base)
        elif kind == "atom":
            self.add_in_order(step, active)
        elif kind == "cvt" and "bf16x2" in name:
            high, low = (self.get(o, where, TYPES["f32"]) for o in ops[1:])
            self.put(ops[0], where, to_bfloat16x2(high, low))
        elif kind == "cvt":
            self.put(ops[0], where, self.get(ops[1], where, TYPES[name[2]]).astype(TYPES[name[1]]))
        else:
            self.put(ops[0], where, self.arithmetic(name, ops[1:], where))

    def arithmetic(self, name: tuple[str, ...], ops: list[str], where: Any) -> Any:
        types = operand_types(name, len(ops))
        return compute(name, [self.get(op, where, t) for op, t in zip(ops, types, strict=True)])

    def copy_async(self, step: Instruction, active: np.ndarray) -> None:
        kind = step.name[2]
        if kind not in ("commit_group", "wait_group", "wait_all"):
            size = int(step.operands[2])
            to = self.bytes_of(step.operands[0], active, "shared", size)
            data = self.read_bytes(
                "global", self.bytes_of(step.operands[1], active, "global", size), active
            )
            # Until it is waited for, nobody may count on what is there, nor on what was.
            self.shared[to] = self.rng.integers(0, 256, to.shape, np.uint8)
            self.copies.append((active, to, data))
        elif kind != "commit_group":
            left = []
            for threads, to, data in self.copies:
                arrived = np.isin(threads, active)
                mine = threads[arrived]
                if len(mine):
                    self.write_bytes("shared", to[arrived], mine, data[arrived])
                if not arrived.all():
                    left.append((threads[~arrived], to[~arrived], data[~arrived]))
            self.copies = left

    def synchronize(self, step: Instruction, active: np.ndarray, after: int) -> None:
        """Barriers and warp-wide instructions: those who come too early wait."""
        kind, ops = step.name[0], step.operands
        if kind in ("bar", "barrier") and step.name[1] != "warp":
            self.pc[active] = after - 1
            if len(active) < (~self.exited).sum():
                self.waiting[active] = True
                return
            if step.name[1] == "red":
                value = self.get(ops[2], active).any()
                self.put(ops[0], active, np.full(len(active), value))
            self.time[active] += 1
            self.pc[active] = after
            return
        named_by = "0xffffffff" if kind == "mma" else ops[0] if kind == "bar" else ops[-1]
        mask = self.get(named_by, active, TYPES["u32"])
        mask = np.broadcast_to(mask, len(active))
        for warp in np.unique(active // WARP):
            lanes = active[active // WARP == warp]
            named = np.unique(mask[active // WARP == warp])
            here = np.bitwise_or.reduce(1 << (lanes % WARP))
            if len(named) > 1 or here & ~int(named[0]):
                raise KernelError(f"lanes {here:#010x} name lanes {[hex(m) for m in named]}")
            if here != named[0]:
                self.pc[lanes], self.waiting[lanes] = after - 1, True
                continue
            self.warp_wide(step, lanes)
            self.pc[lanes] = after

    def warp_wide(self, step: Instruction, lanes: np.ndarray) -> None:
        kind, ops = step.name[0], step.operands
        if kind == "bar":
            self.time[lanes, 0] += 1
        elif kind == "vote":
            ballot = np.bitwise_or.reduce(
                self.get(ops[1], lanes).astype(np.uint32) << (lanes % WARP).astype(np.uint32)
            )
            self.put(ops[0], lanes, np.full(len(lanes), ballot, np.uint32))
        elif kind == "elect":  # not the first, so that nobody relies on that
            self.put(ops[1], lanes, lanes == lanes[-1])
        elif kind == "redux":
            total = self.get(ops[1], lanes, TYPES["u32"]).sum(dtype=np.uint32)
            self.put(ops[0], lanes, np.full(len(lanes), total, np.uint32))
        elif kind == "mma":
            d, a, b, c = map(names_in, ops)
            words = [
                np.stack([self.get(name, lanes, kind) for name in names], axis=1)
                for names, kind in ((a, TYPES["b32"]), (b, TYPES["b32"]), (c, TYPES["f32"]))
            ]
            for name, column in zip(d, multiply_add_tile(*words).T, strict=True):
                self.put(name, lanes, np.ascontiguousarray(column))
        else:
            if len(lanes) != WARP:
                raise KernelError("shuffles between a part of a warp are not implemented")
            value = self.get(ops[2], lanes, TYPES["u32"])
            b, c = (
                np.broadcast_to(self.get(o, lanes, TYPES["u32"]), WARP).astype(np.int64)
                for o in ops[3:5]
            )
            lane, segment, clamp = np.arange(WARP), c >> 8 & 31, c & 31
            least = lane & segment
            most = least | (clamp & ~segment)
            if step.name[2] == "up":
                source = lane - (b & 31)
                valid = source >= most
            else:
                source = lane ^ b if step.name[2] == "bfly" else least | (b & 31 & ~segment)
                valid = source <= most
            source = np.where(valid, source, lane)
            self.put(ops[0], lanes, value[source])
            self.put(ops[1], lanes, valid)
