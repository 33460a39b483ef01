"""`PublishedUnit`: one unit of a published checkpoint, as it is, as a pytree."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, BFloat16, UInt8, UInt32

from df11_jax import _ffi
from df11_jax._host_codec import available_threads, cpu_library
from df11_jax.published import _codebook, _xla_decoder

ARRAYS = ("sign_mantissa", "encoded_exponent", "luts", "output_positions", "gaps")

BLOCK_BYTES = 4096
BLOCK_GAP_BYTES = 320
MAX_SIZE = 2**32 - 1  # positions have 32 bits

_BFLOAT16 = np.dtype(jnp.bfloat16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PublishedUnit:
    """Tensors that a published checkpoint compresses together, in its own layout.

    It is a pytree like any other, of numpy arrays or of arrays on a device. `decompress` gives
    back the tensors, bit for bit, also inside of jit.

    Attributes:
        sign_mantissa: sign and mantissa of each element.
        encoded_exponent: the coded exponents, a stream of bits in blocks of 4096 bytes.
        luts: the look-up tables of the code, and as the last row the lengths of the codes.
        output_positions: the first element whose code starts in each block, and the number of
            elements. A file has these as bytes.
        gaps: the place of the first code in each 8 bytes of the stream.
        names: of the tensors, in the order in which they were concatenated; static.
        shapes: of the tensors; static.
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
        """Number of elements, of all tensors."""
        return sum(map(math.prod, self.shapes))

    @property
    def nbytes(self) -> int:
        """Bytes of the bfloat16 tensors that this stands for."""
        return 2 * self.size

    @property
    def compressed_nbytes(self) -> int:
        """Bytes of the five arrays."""
        return sum(array.dtype.itemsize * math.prod(array.shape) for array in self.arrays)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The five arrays, in the order of the FFI call."""
        return tuple(getattr(self, name) for name in ARRAYS)

    def __repr__(self) -> str:
        # Leaves may be tracers, shapes, or whatever a tree_map put there; none may break this.
        try:
            bits = f"{8 * self.compressed_nbytes / self.size:.2f} bits/weight"
        except Exception:
            bits = ", ".join(
                f"{name}={type(getattr(self, name, None)).__name__}" for name in ARRAYS
            )
        return f"PublishedUnit({_label(self.names)}, {self.size} weights, {bits})"


jax.export.register_pytree_node_serialization(
    PublishedUnit,
    serialized_name="df11_jax.published.PublishedUnit",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda data: _static_fields(*json.loads(data)),
)


def encode_unit(
    tensors: Mapping[str, BFloat16[np.ndarray, "..."]], *, threads: int | None = None
) -> PublishedUnit:
    """Compresses tensors as one unit, on the host.

    The arrays are those that the reference implementation makes of the same tensors. It fails to
    make `luts` where the end symbol's code is at most eight bits long and all 0 (with one distinct
    exponent always, with few often): those entries then lead to a code too.

    Args:
        tensors: the tensors by name, in the order in which they are to be concatenated.
        threads: how many threads to use; None for all that this process may run on.

    Returns:
        The unit, of numpy arrays.

    Raises:
        TypeError: a tensor is not bfloat16.
        ValueError: there are no elements, or the layout cannot hold them: because of an exponent
            of 240 or more (which infinities and NaNs have too), because there are 2^32 elements or
            more, or because of a code that it has no room for.
    """
    parts = [_bits(name, tensor) for name, tensor in tensors.items()]
    shapes = tuple(tuple(np.shape(tensor)) for tensor in tensors.values())
    size = sum(map(len, parts))
    if not 0 < size <= MAX_SIZE:
        raise ValueError(
            f"{_label(tuple(tensors))}: {size} elements in all, and a unit has at least 1 and at "
            f"most {MAX_SIZE}"
        )
    threads = threads or available_threads()
    piece_counts = cpu_library().published_histogram(parts, threads)
    counts = piece_counts.sum(axis=0, dtype=np.int64)
    if counts[_codebook.FIRST_POINTER :].any():
        _refuse_large_exponents(tensors)
    try:
        code = _codebook.build_codebook(counts)
    except ValueError as error:
        raise ValueError(
            f"{_label(tuple(tensors))}: cannot be published as one unit: {error}"
        ) from None
    encoded_exponent, sign_mantissa, output_positions, gaps = cpu_library().published_encode(
        parts, piece_counts, code.bits, code.lengths, code.end.bits, code.end.length, threads
    )
    return PublishedUnit(
        sign_mantissa,
        encoded_exponent,
        code.luts,
        output_positions,
        gaps,
        names=tuple(tensors),
        shapes=shapes,
    )


def decode_host(
    unit: PublishedUnit, start: int = 0, stop: int | None = None, *, threads: int | None = None
) -> BFloat16[np.ndarray, " elements"]:
    """Decodes some elements of a unit on the host, from the blocks that they are in alone.

    Args:
        unit: of numpy arrays; memory-mapped ones are read only where they must be.
        start: the first element, counted over all tensors.
        stop: the element after the last; None for all.
        threads: how many threads to use; None for all that this process may run on.

    Raises:
        ValueError: the unit is corrupt, at least where it was read; the message has its name.
        IndexError: there are no such elements.
    """
    _check_arrays(unit)
    stop = unit.size if stop is None else stop
    threads = threads or available_threads()
    sign_mantissa, encoded_exponent, luts, output_positions, gaps = (
        np.require(array, requirements=["A", "C"]) for array in unit.arrays
    )
    try:
        out = cpu_library().published_decode(
            sign_mantissa, encoded_exponent, luts, output_positions, gaps, start, stop, threads
        )
    except ValueError as error:
        raise ValueError(f"{_label(unit.names)}: is corrupt: {error}") from None
    return out.view(_BFLOAT16)


def decompress(unit: PublishedUnit) -> dict[str, BFloat16[Array, "..."]]:
    """Decompresses a unit on the device.

    It works eagerly and inside `jit`, `vmap`, `scan`, `grad`, `checkpoint`, `shard_map` and
    `export`. Its derivative is zero: the weights are constants.

    Args:
        unit: the unit.

    Returns:
        Its tensors by name, bit for bit what was compressed.

    Raises:
        TypeError: `unit` is not a `PublishedUnit`.
        ValueError: its arrays do not fit each other, or its shapes.
        jax.errors.JaxRuntimeError: when the program runs on a CPU, if the unit is corrupt.
            (Elsewhere the weights of blocks that are corrupt become NaNs instead.)
    """
    if not isinstance(unit, PublishedUnit):
        raise TypeError(f"decompress takes a PublishedUnit, got {type(unit).__name__}")
    _check_arrays(unit)
    weights = _decode(_label(unit.names), *unit.arrays)
    return {name: weights[start:stop].reshape(shape) for name, shape, start, stop in _places(unit)}


def _places(unit: PublishedUnit) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Each tensor's name, shape, and elements."""
    start = 0
    for name, shape in zip(unit.names, unit.shapes, strict=True):
        stop = start + math.prod(shape)
        yield name, shape, start, stop
        start = stop


def _label(names: Sequence[str]) -> str:
    """A unit of tensors with these names, in messages."""
    if len(names) <= 1:
        return names[0] if names else "unit"
    return f"{names[0]} and {len(names) - 1} more"


def _static_fields(names: list[str], shapes: list[list[int]]) -> tuple[Any, ...]:
    return tuple(names), tuple(map(tuple, shapes))


def _check_arrays(unit: PublishedUnit) -> None:
    """Checks types and shapes, of which nothing is known when a unit comes out of a tree_map."""
    stream_bytes = math.prod(unit.encoded_exponent.shape)
    blocks = -(-stream_bytes // BLOCK_BYTES)
    rows, positions = unit.luts.shape[0], unit.output_positions.shape[0]
    expected = {
        "sign_mantissa": (np.uint8, (unit.size,)),
        "encoded_exponent": (np.uint8, (max(stream_bytes, 1),)),
        "luts": (np.uint8, (min(max(rows, 2), _codebook.MAX_ROWS + 1), _codebook.ROW_ENTRIES)),
        # One less is right where no code starts in the last block.
        "output_positions": (np.uint32, (blocks + (positions != blocks or blocks < 2),)),
        "gaps": (np.uint8, (blocks * BLOCK_GAP_BYTES,)),
    }
    for name, (dtype, shape) in expected.items():
        array = getattr(unit, name)
        if array.dtype != dtype or tuple(array.shape) != shape:
            raise ValueError(
                f"{_label(unit.names)}: {name} is {array.dtype}{list(array.shape)}, expected "
                f"{np.dtype(dtype)}{list(shape)} for {unit.size} elements and {stream_bytes} bytes "
                "of encoded_exponent"
            )
    if not 0 < unit.size <= MAX_SIZE:
        raise ValueError(
            f"{_label(unit.names)}: has {unit.size} elements, expected 1 to {MAX_SIZE}"
        )


def _bits(name: str, tensor: Any) -> np.ndarray:
    if not isinstance(tensor, np.ndarray) or tensor.dtype != _BFLOAT16:
        raise TypeError(
            f"{name}: a published unit is made of numpy arrays of bfloat16, got "
            f"{getattr(tensor, 'dtype', type(tensor).__name__)}"
        )
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint16)


def _refuse_large_exponents(tensors: Mapping[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        exponents = _bits(name, tensor) >> 7 & 0xFF
        at = int(np.argmax(exponents >= _codebook.FIRST_POINTER))
        if exponents.size and exponents[at] >= _codebook.FIRST_POINTER:
            index = tuple(map(int, np.unravel_index(at, tensor.shape)))
            raise ValueError(
                f"{name}: element {index} is {float(tensor[index])!r}, and the published layout "
                f"holds only numbers below 2^113 in magnitude (its exponent is {exponents[at]}, of "
                f"which there are 0 to {_codebook.FIRST_POINTER - 1}). Leave this tensor as it is, "
                "or use the native layout, which holds all"
            )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _decode(name: str, *arrays: Array) -> BFloat16[Array, " n"]:
    _ffi.warn_if_slow()
    platforms = _ffi.platforms(_ffi.PUBLISHED_DECODE_TARGET)
    with jax.numpy_rank_promotion("allow"):  # whatever the user wants of their own code
        return _decode_on_any_platform(name, platforms, *arrays)


# Under jit even where the caller is not: platform_dependent would otherwise go by the default
# device, and not by where the arrays are.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _decode_on_any_platform(
    name: str, platforms: tuple[str, ...], *arrays: Array
) -> BFloat16[Array, " n"]:
    def ffi(*arrays: Array) -> BFloat16[Array, " n"]:
        # Not only the shape: in a shard_map, the type also says along which axes results differ.
        out = jax.eval_shape(_xla_decoder.decode, *arrays)
        call = jax.ffi.ffi_call(_ffi.PUBLISHED_DECODE_TARGET, out, vmap_method="sequential")
        return call(*arrays, name=name)

    compiled = dict.fromkeys(platforms, ffi)
    default = _xla_decoder.decode if arrays[0].shape[0] <= _xla_decoder.MAX_SIZE else None
    return jax.lax.platform_dependent(*arrays, **compiled, default=default)


@functools.partial(_decode.defjvp, symbolic_zeros=True)
def _decode_jvp(
    name: str, primals: tuple[Array, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Any]:
    # A tangent's zeros are symbolic: as an array, they would be as large as the weights.
    del tangents
    weights = _decode(name, *primals)
    return weights, SymbolicZero.from_primal_value(weights)
