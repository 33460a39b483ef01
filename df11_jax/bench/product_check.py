"""Whether products with compressed weights are right, before they are timed."""

from collections.abc import Sequence

import numpy as np

from df11_jax.bench.product_programs import ProductPrograms, ProductWeights, Rows
from df11_jax.bench.programs import Program

# Results and plain results are each within 2^-9 of their sums, and sums of bfloat16 parts, which
# cuBLAS may take, within about 2^-6 of what is usual for them. Weights in wrong places are off by
# about as much as is usual.
_TOLERANCE = 2.0**-5

# What rounding to bfloat16 leaves is the same for all who round the same sums, so that errors of
# float32 sums differ by less than a hundredth; such as were rounded twice, or less well, by more.
_MOST_ERROR = 1.1
_COLUMNS = 64


def check_products(
    weights: ProductWeights, x: Sequence[Rows], programs: ProductPrograms
) -> tuple[float, float]:
    """Compares products of compressed weights with those of plain ones, and with exact sums.

    All results of all slices are compared with those of both orientations; some columns of the
    first and the last slice with sums in float64 on the host.

    Args:
        weights: the weights.
        x: the rows of each call.
        programs: the programs, whose results are compared.

    Returns:
        The root of the mean squared error, as a share of that of the results: of the products with
        compressed weights, and of those of plain ones.

    Raises:
        RuntimeError: the results are not those of plain weights, or have larger errors.
    """
    slices = weights.slices
    got = _results(programs.compressed, slices)
    plain = {name: _results(program, slices) for name, program in programs.plain.items()}
    for name, expected in plain.items():
        for i in range(slices):
            _check_all(f"slice {i} of {slices}", got[i], name, expected[i])

    columns = np.unique(np.linspace(0, weights.shape[1] - 1, _COLUMNS).astype(int))
    some = sorted({0, slices - 1})
    exact = [x[i].astype(np.float64) @ weights.columns(i, columns).astype(np.float64) for i in some]

    def error_of(results: Sequence[np.ndarray]) -> float:
        differences = [results[i][:, columns] - sums for i, sums in zip(some, exact, strict=True)]
        return _rms(differences) / _rms(exact)

    error, plain_error = error_of(got), max(map(error_of, plain.values()))
    if not error <= _MOST_ERROR * plain_error:
        raise RuntimeError(
            f"products with compressed weights have an error of {error:.3e}, those with plain "
            f"weights one of {plain_error:.3e}; nothing was timed"
        )
    return error, plain_error


def _results(program: Program, slices: int) -> list[np.ndarray]:
    """The results for each slice, those of several matrices side by side."""
    return [
        np.concatenate([np.asarray(y).astype(np.float32) for y in call], axis=1)
        for call in program.run()[:slices]
    ]


def _check_all(where: str, got: np.ndarray, name: str, expected: np.ndarray) -> None:
    difference = np.abs(got - expected)
    wrong = ~(difference <= _TOLERANCE * (np.abs(expected) + _rms([expected])))  # NaNs, too
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise RuntimeError(
            f"products with compressed weights are wrong: {np.count_nonzero(wrong)} of "
            f"{wrong.size} results for {where}, such as {got[row, column]} in row {row}, column "
            f"{column}, where {name} gives {expected[row, column]}; nothing was timed"
        )


def _rms(arrays: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(np.mean([np.mean(np.square(array)) for array in arrays])))
