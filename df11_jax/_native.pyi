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
def decode_count() -> int: ...
def simd_levels() -> list[str]: ...
def use_simd(name: str) -> None: ...
