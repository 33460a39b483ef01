"""The self-test: every decoder on a device gives back what was encoded, bit for bit.

So does the fused product: rows with a single 1 pick the weights of a row.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import UInt16

from df11_jax import _ffi, _host_codec, _layout, _xla_decoder, published
from df11_jax._array import DF11Array
from df11_jax._decode import decompress
from df11_jax._product import dot
from df11_jax._promotion import with_promotion
from df11_jax.published import xla_decoder as _published_xla_decoder

PLAIN = "plain XLA"
PRODUCT = "fused product"

_PATTERNS = 65536
_ROWS = (8, 16, 32)  # of a product: there is a kernel for up to so many
_MATRIX_SHAPE = (512, 384)
_LEAST_OF_PUBLISHED = 0xF0  # the exponents that the published layout does not hold begin here

Bits = UInt16[np.ndarray, "..."]
Decode = Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a decoder, or the product, did with one layout.

    Attributes:
        platform: the platform of the device; "host" for the encoders.
        device: the kind of the device.
        decoder: the name of the decoder: "AVX-512", "CUDA", "plain XLA", ...
        layout: the name of the layout: "native" or "published".
        weights: the number of weights that were compared.
        seconds: the seconds that it took, with compilation.
        error: the difference or the failure; None if every bit came back.
    """

    platform: str
    device: str
    decoder: str
    layout: str
    weights: int
    seconds: float
    error: str | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """Weights, as they are and encoded on the host in one layout."""

    layout: str
    bits: Bits
    encoded: Any


def encode_samples() -> tuple[list[Sample], list[Outcome]]:
    """Encodes weights in both layouts.

    Returns:
        The samples that could be encoded, and the outcome of each encoder.
    """
    samples, outcomes = [], []
    for layout, bits, encode in (
        ("native", _native_bits(), _encode_native),
        ("published", _published_bits(), _encode_published),
    ):
        start, error = time.perf_counter(), None
        try:
            samples.append(Sample(layout, bits, encode(bits)))
        except Exception as problem:  # whatever it is, the outcome is to say it
            error = _message(problem)
        seconds = time.perf_counter() - start
        outcomes.append(Outcome("host", "host", "encoder", layout, bits.size, seconds, error))
    return samples, outcomes


def check_device(device: jax.Device, platform: str, samples: list[Sample]) -> Iterator[Outcome]:
    """Decodes samples on a device, with every decoder that it has.

    Args:
        device: the device to decode on.
        platform: the name of its backend in JAX.
        samples: the weights to decode.

    Yields:
        The outcome of each decoder.
    """
    for sample in samples:
        for decoder, decode, context in _decoders(platform, sample.layout):
            start, error = time.perf_counter(), None
            try:
                with (
                    context,
                    jax.default_device(device),
                    jax.debug_nans(False),  # which are among the weights, and so are infinities
                    jax.debug_infs(False),
                ):
                    decoded = decode(jax.device_put(sample.encoded, device))
                    error = _difference(np.asarray(decoded).view(np.uint16), sample.bits)
            except Exception as problem:  # XLA's, above all
                error = _message(problem)
            seconds = time.perf_counter() - start
            kind = device.device_kind
            yield Outcome(platform, kind, decoder, sample.layout, sample.bits.size, seconds, error)


def check_product(device: jax.Device, platform: str) -> Outcome:
    """Multiplies with matrices on a device, in both orders of pairs.

    Args:
        device: the device to multiply on.
        platform: the name of its backend in JAX.
    """
    start, bits = time.perf_counter(), _matrix_bits()
    picks = jnp.eye(len(bits), dtype=jnp.bfloat16)
    error = None
    try:
        for along_columns in (False, True):
            matrix = _encode_matrix(bits.T if along_columns else bits, along_columns)
            with jax.default_device(device):
                matrix = jax.device_put(matrix, device)
                for rows in _ROWS:
                    each = [dot(picks[i : i + rows], matrix) for i in range(0, len(bits), rows)]
                    picked = np.asarray(jnp.concatenate(each)).view(np.uint16)
                    error = error or _difference(picked, bits)
    except Exception as problem:  # XLA's, above all
        error = _message(problem)
    seconds, kind = time.perf_counter() - start, device.device_kind
    return Outcome(platform, kind, PRODUCT, "native", bits.size, seconds, error)


def _decoders(
    platform: str, layout: str
) -> Iterator[tuple[str, Decode, contextlib.AbstractContextManager[None]]]:
    """The name of each decoder, the function that calls it, and the context to call it in."""
    if layout == "native":
        compiled, plain = jax.jit(decompress), jax.jit(_decode_native_plainly)
    else:
        compiled, plain = jax.jit(_decode_published), jax.jit(_decode_published_plainly)
    if platform == "cpu" and _ffi.find_obstacle("cpu") is None:
        # All of them, for other processors have less than the best one here.
        for level in _host_codec.cpu_library().simd_levels():
            yield simd_name(level), compiled, _use_simd(level)
    elif platform == "cuda" and _ffi.find_obstacle("cuda") is None:
        yield "CUDA", compiled, contextlib.nullcontext()
    yield PLAIN, plain, contextlib.nullcontext()


def simd_name(level: str) -> str:
    """An instruction set, as people write it."""
    names = {"avx512_vbmi": "AVX-512 with VBMI", "avx512": "AVX-512", "avx2": "AVX2"}
    return names.get(level, level)


@contextlib.contextmanager
def _use_simd(level: str) -> Iterator[None]:
    library = _host_codec.cpu_library()
    library.use_simd(level)
    try:
        yield
    finally:
        library.use_simd(library.simd_levels()[-1])


def _native_bits() -> Bits:
    """A stack of two slices: of common weights alone, and with every bit pattern among them."""
    normal = _normal(2 * 257 * 511).reshape(2, -1)
    normal[1, :_PATTERNS] = np.arange(_PATTERNS)
    np.random.default_rng(1).shuffle(normal[1])
    return normal.reshape(2, 257, 511)


def _matrix_bits() -> Bits:
    """A matrix with every bit pattern of a normal number, the only ones that sums keep."""
    patterns = np.arange(_PATTERNS, dtype=np.uint16)
    exponents = patterns >> 7 & 0xFF
    patterns = patterns[(exponents > 0) & (exponents < 0xFF)]
    bits = np.concatenate([patterns, _normal(math.prod(_MATRIX_SHAPE) - patterns.size)])
    return np.random.default_rng(1).permutation(bits).reshape(_MATRIX_SHAPE)


def _published_bits() -> Bits:
    """Every bit pattern that the layout holds, and few enough weights beside them.

    With more, the code would get longer than the layout allows.
    """
    patterns = np.arange(_PATTERNS, dtype=np.uint16)
    patterns = patterns[(patterns >> 7 & 0xFF) < _LEAST_OF_PUBLISHED]
    return np.random.default_rng(1).permutation(np.concatenate([patterns, _normal(5001)]))


def _normal(size: int) -> UInt16[np.ndarray, " size"]:
    values = 0.02 * np.random.default_rng(0).standard_normal(size)
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def _encode_native(bits: Bits) -> DF11Array:
    layout = _layout.make_layout(bits.shape[1:])
    parts = _host_codec.encode(bits.view(ml_dtypes.bfloat16), "self-test", layout)
    return DF11Array.from_payload(parts, layout)


def _encode_matrix(bits: Bits, along_columns: bool) -> DF11Array:
    layout = _layout.make_layout(bits.shape, along_columns=along_columns)
    weights = np.ascontiguousarray(bits).view(ml_dtypes.bfloat16)
    parts = _host_codec.encode(weights[None], "self-test", layout)
    return DF11Array.from_payload([part[0] for part in parts], layout)


def _encode_published(bits: Bits) -> published.PublishedUnit:
    return published.encode_unit({"self-test": bits.view(ml_dtypes.bfloat16)})


@with_promotion
def _decode_native_plainly(array: DF11Array) -> jax.Array:
    index = jnp.arange(array.stack_shape[0], dtype=jnp.int32)
    payload = (leaf[None] for leaf in array.payload)
    return _xla_decoder.decode(index, *payload, layout=array.layout)


def _decode_published(unit: published.PublishedUnit) -> jax.Array:
    return published.decompress(unit)["self-test"]


@with_promotion
def _decode_published_plainly(unit: published.PublishedUnit) -> jax.Array:
    return _published_xla_decoder.decode(*unit.arrays)


def _difference(actual: Bits, expected: Bits) -> str | None:
    if actual.shape != expected.shape:
        return f"decoded to shape {actual.shape}, expected {expected.shape}"
    wrong = np.argwhere(actual != expected)
    if not len(wrong):
        return None
    at = tuple(map(int, wrong[0]))
    return (
        f"{len(wrong):,} of {expected.size:,} weights differ; the first is {at}: "
        f"0x{actual[at]:04x}, expected 0x{expected[at]:04x}"
    )


def _message(problem: Exception) -> str:
    return str(problem).strip() or type(problem).__name__
