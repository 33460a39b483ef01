"""What `df11-jax bench --product` times: products with compressed weights, and with plain ones."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16

from df11_jax._array import DF11Slice
from df11_jax._host_arrays import BFLOAT16
from df11_jax._product import dot, is_fused_in
from df11_jax.bench.programs import Program
from df11_jax.bench.workload import (
    COMPRESSED_BYTES,
    Workload,
    compress_originals,
    draw_originals,
    slices_beyond_cache,
)

# Of one program, so that it takes a GPU longer than the host takes to send the next.
_FEWEST_CALLS = 16

Rows = BFloat16[np.ndarray, "rows k"]

# How plain weights lie in memory: as [k, n], or as [n, k].
_ORIENTATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "x @ W": lambda x, w: x @ w,
    "x @ E.T": lambda x, e: x @ e.T,
}


class ProductWeights(NamedTuple):
    """The weights of one product, compressed and plain, in several slices.

    Attributes:
        workload: the compressed matrices, side by side.
        plain: all slices in each orientation, the matrices merged into one. Each slice is an array
            of its own: XLA would copy those that it takes out of a stack.
    """

    workload: Workload
    plain: dict[str, tuple[Array, ...]]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [k, n] of the merged matrix."""
        slices = [array.slice_shape for array in self.workload.arrays]
        return slices[0][0], sum(n for _, n in slices)

    @property
    def slices(self) -> int:
        """The number of slices."""
        return self.workload.slices

    def columns(self, index: int, columns: np.ndarray) -> BFloat16[np.ndarray, "k columns"]:
        """Columns of a slice of the merged matrix."""
        return np.asarray(self.plain["x @ W"][index][:, columns])


class ProductPrograms(NamedTuple):
    """The programs for so many rows. Their results are those of each call, a list of matrices'.

    Attributes:
        compressed: the products with compressed weights.
        plain: those with plain weights, in each orientation.
        is_fused: whether the compressed weights are multiplied without being decoded first.
    """

    compressed: Program
    plain: dict[str, Program]
    is_fused: bool


def make_product_weights(name: str, matrices: Mapping[str, tuple[int, int]]) -> ProductWeights:
    """Draws and compresses the weights of one product.

    Args:
        name: the name of the product.
        matrices: the name and the shape [k, n] of each matrix; all have the same k.

    Raises:
        RuntimeError: the device does not decode what was compressed.
    """
    slices = count_slices(sum(k * n for k, n in matrices.values()))
    originals = draw_originals(matrices, slices)
    workload = compress_originals(name, originals)
    merge = jax.jit(lambda stacks, i: jnp.concatenate([stack[i] for stack in stacks], axis=1))
    transpose = jax.jit(jnp.transpose)
    merged = tuple(merge(list(originals.values()), i) for i in range(slices))
    return ProductWeights(workload, {"x @ W": merged, "x @ E.T": tuple(map(transpose, merged))})


def count_slices(weights: int) -> int:
    """The number of slices of a product of so many weights: they come out of memory, not a cache.

    Two at least: of a single one, a cache may keep the end. On a CPU, no more than XLA compiles in
    a short time, which may stay in its cache.
    """
    slices = max(2, slices_beyond_cache(weights, COMPRESSED_BYTES))
    return min(slices, _FEWEST_CALLS) if jax.default_backend() == "cpu" else slices


def product_memory_needed(weights: int) -> int:
    """The bytes of device memory for measuring the products with so many weights."""
    # While the plain ones are made, all slices are there as drawn, compressed, merged, and
    # transposed. Products that are not fused decode one slice; a CPU makes it float32.
    return round(weights * ((3 * 2 + COMPRESSED_BYTES) * count_slices(weights) + 2 + 4))


def draw_rows(weights: ProductWeights, rows: int) -> list[Rows]:
    """Draws the rows that each call of a program multiplies, on the host."""
    return [
        np.random.default_rng(i)
        .standard_normal((rows, weights.shape[0]), np.float32)
        .astype(BFLOAT16)
        for i in range(_count_calls(weights.slices))
    ]


def compile_products(weights: ProductWeights, x: Sequence[Rows]) -> ProductPrograms:
    """Compiles the programs that multiply with one slice after the other.

    Args:
        weights: the weights.
        x: the rows of each call.
    """
    backend = jax.default_backend()
    indices = [jnp.int32(i % weights.slices) for i in range(len(x))]
    programs, compiled = {}, {}
    for name, calls in product_calls(
        weights, list(map(jnp.asarray, x)), indices, chained=backend == "cpu"
    ).items():
        lowered = jax.jit(calls.function).lower(*calls.arguments)
        compiled[name] = lowered.compile(compiler_options=compiler_options(backend))
        run = functools.partial(compiled[name], *calls.arguments)
        programs[name] = Program(run, len(x))
    fused = is_fused_in(compiled["compressed"])
    return ProductPrograms(programs.pop("compressed"), programs, fused)


class Calls(NamedTuple):
    """A function that makes the calls of a program, and its arguments."""

    function: Callable[..., list[list[Array]]]
    arguments: tuple[Any, ...]


def product_calls(
    weights: ProductWeights, x: Sequence[Array], indices: Sequence[Array], *, chained: bool
) -> dict[str, Calls]:
    """What the programs do, "compressed" and in each orientation. Shapes will do for all arrays.

    No two calls have the same operands for XLA, so that it takes none for another, and merges none;
    all results are returned, so that it drops none.

    Args:
        weights: the weights.
        x: the rows [rows, k] of each call.
        indices: the index of the slice that each call multiplies, of compressed weights.
        chained: whether each call depends on the one before: for a CPU, which would do several at
            once. Elsewhere, that would take kernels between any two.
    """

    def multiply_compressed(x: Array, index: Array, stacks: Any) -> list[Array]:
        return dot(x, [DF11Slice(stack, index) for stack in stacks])

    def multiply_plain(name: str, x: Array, matrix: Array) -> list[Array]:
        return [_ORIENTATIONS[name](x, matrix)]

    def in_turn(multiply: Callable[..., list[Array]], operands: Any, weights: Any) -> Any:
        results: list[list[Array]] = []
        for i, each in enumerate(operands):
            call = functools.partial(multiply, *each, weights[i % len(weights)])
            results.append(_after(results[-1], call) if chained and results else call())
        return results

    calls = {
        "compressed": Calls(
            functools.partial(in_turn, multiply_compressed),
            (list(zip(x, indices, strict=True)), [weights.workload.arrays]),
        )
    }
    for name, slices in weights.plain.items():
        # XLA does not know that the slice of a call is that of another.
        each = [slices[i % len(slices)] for i in range(len(x))]
        multiply = functools.partial(multiply_plain, name)
        calls[name] = Calls(functools.partial(in_turn, multiply), ([(rows,) for rows in x], each))
    return calls


def compiler_options(backend: str) -> dict[str, Any] | None:
    """The options of XLA: on a GPU, cuBLAS, and one CUDA graph that runs one call at a time."""
    if backend != "gpu":
        return None
    return {
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_graph_min_graph_size": 1,
        "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
    }


def _after(former: list[Array], call: Callable[[], list[Array]]) -> list[Array]:
    """The results of a call that depends on former results, of the same shapes, without NaNs.

    XLA takes nothing out of the branch. If rows alone depended on former results, a CPU would
    decode for all calls at first, or make plain weights float32: in other memory for each, which
    takes several times as long as the products.
    """
    is_nan = jnp.isnan(former[0][0, 0])
    return jax.lax.cond(is_nan, lambda: [jnp.zeros_like(y) for y in former], call)


def _count_calls(slices: int) -> int:
    return slices * -(-_FEWEST_CALLS // slices)
