from collections.abc import Sequence
from typing import Any

import numpy as np

def handlers() -> dict[str, Any]: ...
def encode(
    weights: np.ndarray, dims: Sequence[int], threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...
def find_difference(
    weights: np.ndarray,
    dims: Sequence[int],
    codebook: np.ndarray,
    chunk_offsets: np.ndarray,
    exponents: np.ndarray,
    sign_mantissa: np.ndarray,
    threads: int,
) -> int: ...
def decode(
    weights: np.ndarray,
    dims: Sequence[int],
    codebook: np.ndarray,
    chunk_offsets: np.ndarray,
    exponents: np.ndarray,
    sign_mantissa: np.ndarray,
    threads: int,
) -> int: ...
def verify(
    dims: Sequence[int],
    codebook: np.ndarray,
    chunk_offsets: np.ndarray,
    exponents: np.ndarray,
    sign_mantissa: np.ndarray,
    threads: int,
) -> int: ...
def decode_count() -> int: ...
def simd_levels() -> list[str]: ...
def use_simd(name: str) -> None: ...
def published_histogram(parts: Sequence[np.ndarray], threads: int) -> np.ndarray: ...
def published_encode(
    parts: Sequence[np.ndarray],
    counts: np.ndarray,
    code_bits: np.ndarray,
    code_lengths: np.ndarray,
    tail_bits: int,
    tail_length: int,
    threads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...
def published_decode(
    sign_mantissa: np.ndarray,
    encoded_exponent: np.ndarray,
    luts: np.ndarray,
    output_positions: np.ndarray,
    gaps: np.ndarray,
    start: int,
    stop: int,
    threads: int,
) -> np.ndarray: ...
def published_check(
    sign_mantissa: np.ndarray,
    encoded_exponent: np.ndarray,
    luts: np.ndarray,
    output_positions: np.ndarray,
    gaps: np.ndarray,
) -> str: ...
