"""What hosts send to each other, by the text of a program that XLA has compiled for them."""

import math
import re
from collections.abc import Iterator

import numpy as np

_ITEM_BYTES = {"f32": 4, "u32": 4, "s32": 4, "bf16": 2, "u16": 2, "pred": 1}
_OPERATION = re.compile(r"= (.*?) (all-reduce|all-gather|collective-permute)(-start)?\(")
# What is sent of an array by each of `n` devices in a ring, in arrays.
_RING = {"all-reduce": lambda n: 2 * (n - 1) / n, "all-gather": lambda n: (n - 1) / n}


def bytes_sent(program: str, hosts: int) -> int:
    """The bytes that a host sends to others in each step of a program's loop.

    Devices that exchange something are taken to form a ring, in which those of a host are
    neighbours: so each host sends what one device sends.

    Args:
        program: the text of the program, which runs one loop of unknown length. Loops in it whose
            lengths are not known either run once, or not at all.
        hosts: the number of hosts, each of which has equally many of the devices, in their order.

    Returns:
        The bytes of the host that sends the most.
    """
    devices = int(re.search(r"num_partitions=(\d+)", program)[1])
    sent = [0.0] * hosts
    for line, times in _operations(program):
        for host, nbytes in _sent(line, lambda device: device * hosts // devices):
            sent[host] += times * nbytes
    return round(max(sent))


def _operations(program: str) -> Iterator[tuple[str, int]]:
    """The lines of operations that exchange something, and how often each runs in a step."""
    bodies, entry = {}, ""
    for text in re.split(r"\n\n", program):
        if found := re.match(r"\s*(ENTRY )?%?([\w.\-]+) .*\{$", text.partition("\n")[0]):
            bodies[found[2]] = text
            entry = found[2] if found[1] else entry
    todo = [(entry, 1)]
    while todo:
        name, times = todo.pop()
        for line in bodies[name].splitlines():
            if _OPERATION.search(line):
                yield line, times
            if body := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                todo.append((body[1], times * (int(count[1]) if count else 1)))


def _sent(line: str, host_of) -> Iterator[tuple[int, float]]:
    """The hosts that send something in an operation, and the bytes that each sends."""
    shapes, kind, start = _OPERATION.search(line).groups()
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    if start and kind != "all-reduce":  # what goes in is named, too
        arrays = arrays[len(arrays) // 2 :]
    nbytes = sum(
        _ITEM_BYTES[dtype] * math.prod(map(int, filter(None, shape.split(","))))
        for dtype, shape in arrays
    )
    for group in _groups(line):
        hosts = [host_of(device) for device in group]
        if len(set(hosts)) > 1:
            if kind == "collective-permute":
                yield hosts[0], nbytes
            else:
                yield from ((host, _RING[kind](len(hosts)) * nbytes) for host in set(hosts))


def _groups(line: str) -> list[list[int]]:
    """The devices that exchange something with each other, in any of the ways that XLA prints.

    Raises:
        ValueError: it is another way.
    """
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{(.*?)\}\}", line):
        return [_integers(group) for group in found[1].split("},{")]
    # `[groups,devices]<=[shape]T(axes)`: the devices in order, in that shape and transposed.
    if found := re.search(r"replica_groups=\[(\S+?)\]<=\[(\S+?)\](?:T\((\S+?)\))?[, ]", line):
        shape, from_shape = _integers(found[1]), _integers(found[2])
        axes = _integers(found[3]) if found[3] else range(len(from_shape))
        devices = np.arange(math.prod(shape)).reshape(from_shape)
        return devices.transpose(axes).reshape(shape).tolist()
    # `mesh['x'=2,'y'=4] {'x'}`: those along these axes of a mesh of all devices in order.
    if found := re.search(r"replica_groups=mesh\[('[^\]]*)\] \{((?:'\w+',?)+)\}[, ]", line):
        mesh = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        along = [list(mesh).index(axis) for axis in re.findall(r"'(\w+)'", found[2])]
        devices = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
        size = math.prod(devices.shape[axis] for axis in along)
        return np.moveaxis(devices, along, range(-len(along), 0)).reshape(-1, size).tolist()
    raise ValueError(f"unknown groups of devices in {line.strip()}")


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
