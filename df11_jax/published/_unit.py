"""`PublishedUnit`, one unit of a published checkpoint as a pytree, and its decoders."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.export
import numpy as np
from jaxtyping import Array, BFloat16, UInt8, UInt32

from df11_jax import _ffi
from df11_jax._ffi_call import DecoderCall, call_decoder
from df11_jax._host_arrays import BFLOAT16
from df11_jax._host_codec import cpu_library, thread_count
from df11_jax.published import _codebook, xla_decoder

ARRAYS = ("sign_mantissa", "encoded_exponent", "luts", "output_positions", "gaps")

BLOCK_BYTES = 4096
BLOCK_GAP_BYTES = 320
MAX_SIZE = 2**32 - 1  # positions have 32 bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PublishedUnit:
    """Tensors that a published checkpoint compresses together, in its own layout.

    It is a pytree like any other, of numpy arrays or of arrays on a device. `decompress` gives
    back the tensors, bit for bit, also inside of jit.

    Attributes:
        sign_mantissa: sign and mantissa of each element.
        encoded_exponent: the coded exponents, a stream of bits in blocks of 4096 bytes.
        luts: the look-up tables of the code; the last row has the lengths of the codes.
        output_positions: the first element whose code starts in each block, and the number of
            elements. A file has these as bytes.
        gaps: the place of the first code in each 8 bytes of the stream.
        names: the names of the tensors, in the order in which they were concatenated; static.
        shapes: the shapes of the tensors; static.
    """

    sign_mantissa: UInt8[Array | np.ndarray, " n"]
    encoded_exponent: UInt8[Array | np.ndarray, " bytes"]
    luts: UInt8[Array | np.ndarray, "rows_and_lengths 256"]
    output_positions: UInt32[Array | np.ndarray, " blocks_and_end"]
    gaps: UInt8[Array | np.ndarray, " gap_bytes"]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    shapes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> int:
        """The number of elements of all tensors."""
        return sum(map(math.prod, self.shapes))

    @property
    def nbytes(self) -> int:
        """The bytes of the bfloat16 tensors that this stands for."""
        return 2 * self.size

    @property
    def compressed_nbytes(self) -> int:
        """The bytes of the five arrays."""
        return sum(array.dtype.itemsize * math.prod(array.shape) for array in self.arrays)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The five arrays, in the order of the FFI call."""
        return tuple(getattr(self, name) for name in ARRAYS)

    def __repr__(self) -> str:
        # Leaves may be tracers, shapes, or anything else that a tree_map put there.
        try:
            bits = f"{8 * self.compressed_nbytes / self.size:.2f} bits/weight"
        except Exception:
            bits = ", ".join(
                f"{name}={type(getattr(self, name, None)).__name__}" for name in ARRAYS
            )
        return f"PublishedUnit({unit_label(self.names)}, {self.size} weights, {bits})"


jax.export.register_pytree_node_serialization(
    PublishedUnit,
    serialized_name="df11_jax.published.PublishedUnit",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda data: _static_fields(*json.loads(data)),
)


def decode_host(
    unit: PublishedUnit, start: int = 0, stop: int | None = None, *, threads: int | None = None
) -> BFloat16[np.ndarray, " elements"]:
    """Decodes some elements of a unit on the host, and reads only the blocks that hold them.

    Args:
        unit: a unit of numpy arrays, which may be memory-mapped.
        start: the first element, counted over all tensors.
        stop: the element after the last; None for all.
        threads: the number of threads; None for all that this process may run on.

    Raises:
        ValueError: the part of the unit that was read is corrupt; the message has the unit's name.
        IndexError: there are no such elements.
    """
    _check_arrays(unit)
    stop = unit.size if stop is None else stop
    threads = thread_count(threads)
    sign_mantissa, encoded_exponent, luts, output_positions, gaps = (
        np.require(array, requirements=["A", "C"]) for array in unit.arrays
    )
    try:
        out = cpu_library().published_decode(
            sign_mantissa, encoded_exponent, luts, output_positions, gaps, start, stop, threads
        )
    except ValueError as error:
        raise ValueError(f"{unit_label(unit.names)}: is corrupt: {error}") from None
    return out.view(BFLOAT16)


def decompress(unit: PublishedUnit) -> dict[str, BFloat16[Array, "..."]]:
    """Decompresses a unit on the device.

    It works eagerly and inside `jit`, `vmap`, `scan`, `grad`, `checkpoint`, `shard_map` and
    `export`. Its derivative is zero: the weights are constants.

    Args:
        unit: the unit.

    Returns:
        Its tensors by name, bit for bit those that were compressed.

    Raises:
        TypeError: `unit` is not a `PublishedUnit`.
        ValueError: its arrays do not fit each other, or its shapes.
        jax.errors.JaxRuntimeError: the unit is corrupt, and the program runs on a CPU. (On other
            devices, the weights of corrupt blocks become NaNs instead.)
    """
    if not isinstance(unit, PublishedUnit):
        raise TypeError(f"decompress takes a PublishedUnit, got {type(unit).__name__}")
    _check_arrays(unit)
    decoder = DecoderCall(
        _ffi.PUBLISHED_DECODE_TARGET,
        "sequential",
        attributes=(("name", unit_label(unit.names)),),
        xla=xla_decoder.decode,
        falls_back=unit.size <= xla_decoder.MAX_SIZE,
    )
    weights = call_decoder(decoder, *unit.arrays)
    return {name: weights[start:stop].reshape(shape) for name, shape, start, stop in _places(unit)}


def _places(unit: PublishedUnit) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """The name, the shape, the first element and the end of each tensor."""
    start = 0
    for name, shape in zip(unit.names, unit.shapes, strict=True):
        stop = start + math.prod(shape)
        yield name, shape, start, stop
        start = stop


def unit_label(names: Sequence[str]) -> str:
    """The name that messages give to a unit of these tensors."""
    if len(names) <= 1:
        return names[0] if names else "unit"
    return f"{names[0]} and {len(names) - 1} more"


def _static_fields(names: list[str], shapes: list[list[int]]) -> tuple[Any, ...]:
    return tuple(names), tuple(map(tuple, shapes))


def _check_arrays(unit: PublishedUnit) -> None:
    """Checks dtypes and shapes, since a tree_map can put anything into a unit."""
    stream_bytes = math.prod(unit.encoded_exponent.shape)
    blocks = -(-stream_bytes // BLOCK_BYTES)
    rows, positions = unit.luts.shape[0], unit.output_positions.shape[0]
    expected = {
        "sign_mantissa": (np.uint8, (unit.size,)),
        "encoded_exponent": (np.uint8, (max(stream_bytes, 1),)),
        "luts": (np.uint8, (min(max(rows, 2), _codebook.MAX_ROWS + 1), _codebook.ROW_ENTRIES)),
        # There is one position less if no code starts in the last block.
        "output_positions": (np.uint32, (blocks + (positions != blocks or blocks < 2),)),
        "gaps": (np.uint8, (blocks * BLOCK_GAP_BYTES,)),
    }
    for name, (dtype, shape) in expected.items():
        array = getattr(unit, name)
        if array.dtype != dtype or tuple(array.shape) != shape:
            raise ValueError(
                f"{unit_label(unit.names)}: {name} is {array.dtype}{list(array.shape)}, expected "
                f"{np.dtype(dtype)}{list(shape)} for {unit.size} elements and {stream_bytes} bytes "
                "of encoded_exponent"
            )
    if not 0 < unit.size <= MAX_SIZE:
        raise ValueError(
            f"{unit_label(unit.names)}: has {unit.size} elements, expected 1 to {MAX_SIZE}"
        )
