"""Reads arrays by Orbax's handlers, but checks what is stored before memory is taken for it.

A few bytes of zarr's metadata can declare an array of terabytes. TensorStore takes the memory for
it before it looks for its data, and ends the process if there is not that much.
"""

import asyncio
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers


class Stored(NamedTuple):
    """What zarr's metadata says of an array.

    Attributes:
        name: its name in Orbax: the keys that lead to it, joined by dots.
        shape: its shape.
        dtype: the name of its dtype.
        nbytes: the bytes of the chunks that this process is to read.
        memory: the bytes of memory that reading them takes at least.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    memory: int

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


# What TensorStore takes for each chunk while it reads it, about half of 1.1 kB measured.
_BYTES_PER_CHUNK = 512

# Raises if arrays, which are to be read together, are not what they should be.
Check = Callable[[Sequence[Stored]], None]


class StoredArrayError(ValueError):
    """An array that is stored is not what it should be; the message says all that there is."""


def handler(check: Check) -> ocp.PyTreeCheckpointHandler:
    """Makes a handler that reads checkpoints.

    Args:
        check: a function that is called with what is to be read at once, before it is read.
    """
    return ocp.PyTreeCheckpointHandler(type_handler_registry=_Registry(check))


def memory_bytes() -> int:
    """The memory of this machine, swap included; more than there can be if nothing says it."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return 1024 * sum(int(fields[name].split()[0]) for name in ("MemTotal", "SwapTotal"))
    except (KeyError, OSError, ValueError):
        return sys.maxsize


def can_allocate(nbytes: int) -> bool:
    """Whether this process would get so much memory, of which none is touched."""
    try:
        np.empty(nbytes, np.uint8)
    except (MemoryError, ValueError):  # the latter for more bytes than numpy can count
        return False
    return nbytes <= memory_bytes()


class _Registry(type_handlers.TypeHandlerRegistry):
    """Orbax's handlers for the types of leaves; those for arrays check them first."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._checked: dict[Any, _CheckedHandler] = {}

    def add(self, *args: Any, **options: Any) -> None:
        raise NotImplementedError("types are registered with Orbax")

    def get(self, ty: Any) -> Any:
        found = type_handlers.get_type_handler(ty)
        if not isinstance(found, (type_handlers.NumpyHandler, type_handlers.ArrayHandler)):
            return found  # its leaves are no arrays of zarr
        return self._checked.setdefault(found, _CheckedHandler(found, self._check))

    def has(self, ty: Any) -> bool:
        return type_handlers.has_type_handler(ty)


class _CheckedHandler(type_handlers.TypeHandler):
    """One of Orbax's handlers for arrays, with a check before it reads."""

    _array_metadata_store = None  # Orbax asks for it, in order to save, and warns if there is none

    def __init__(self, orbax: Any, check: Check) -> None:
        self._orbax = orbax
        self._check = check

    def typestr(self) -> str:
        return self._orbax.typestr()

    async def metadata(self, infos: Any) -> Any:
        return await self._orbax.metadata(infos)

    async def serialize(self, *args: Any) -> Any:
        raise NotImplementedError("this handler only reads")

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        arrays = await _gather(map(_open, infos))
        args = args or [ocp.RestoreArgs()] * len(infos)
        self._check([_describe(*each) for each in zip(infos, arrays, args, strict=True)])
        if type(self._orbax) is type_handlers.NumpyHandler:
            # All that this does is to open them once more, and to read them.
            return await _gather(array.read() for array in arrays)
        return await self._orbax.deserialize(infos, args)


async def _gather(awaitables: Iterable[Any]) -> list[Any]:
    """The results of all, none of which is still pending if one has failed."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _open(info: Any) -> Any:
    spec = type_handlers.get_json_tspec_read(
        info,
        use_ocdbt=info.is_ocdbt_checkpoint,
        raise_array_data_missing_error=info.raise_array_data_missing_error,
    )
    return tensorstore.open(tensorstore.Spec(spec), open=True, context=info.ts_context)


def _describe(info: Any, array: Any, args: Any) -> Stored:
    read = array.shape
    sharding = getattr(args, "sharding", None)
    if sharding is not None:
        read = sharding.shard_shape(read)
    chunks = array.chunk_layout.read_chunk_template.shape
    counts = [-(-n // chunk) for n, chunk in zip(read, chunks, strict=True)]
    nbytes = math.prod((*counts, *chunks, array.dtype.numpy_dtype.itemsize))
    memory = nbytes + math.prod(counts) * _BYTES_PER_CHUNK
    return Stored(info.name, array.shape, str(array.dtype.numpy_dtype), nbytes, memory)
