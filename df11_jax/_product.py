"""Products with compressed matrices, which a GPU decodes in registers and multiplies there.

The matrix then never exists in memory. On CUDA, from compute capability 8.0, products of a few rows
are fused in that way. Others decode the matrix first and leave the product to XLA.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int32

from df11_jax import _ffi, _layout
from df11_jax._array import DF11Array, DF11Slice
from df11_jax._ffi_call import result_types
from df11_jax._layout import Layout, View
from df11_jax._leaves import is_array, raw_value
from df11_jax._slices import (
    as_index,
    check_index,
    check_stacks,
    constant_index,
    decode_slices,
    is_split,
)
from df11_jax._symbolic import holds

# As many rows of x as the kernel takes. With 32, the products of a Llama-3.1-8B block take an H200
# 297 us, and decoding first takes about 320 (docs/figures.md).
MOST_FUSED_ROWS = 32
FUSED_TYPES = (jnp.bfloat16, jnp.float32)  # of results
_MATRICES_PER_CALL = 4
# An item of the kernel's work is so many chunks that there are about as many items: see
# xla_ffi/native/cuda/product.h.
_ITEMS = 28 * 132

Matrix = DF11Array | DF11Slice | Array


def dot(
    x: Float[Array, "*batch k"],
    a: Matrix | Sequence[Matrix],
    *,
    preferred_element_type: Any = None,
    exact: bool = False,
) -> Any:
    """Multiplies with a compressed matrix: `x @ W`, or `x @ E.T` if its pairs are along columns.

    A matrix that is not compressed is multiplied by XLA, `x @ W`: of the leaves of one model, some
    may have stayed plain.

    A sharded matrix is decoded where its shards are, and XLA multiplies. In a `jax.shard_map`, the
    product is that of the shards, and can be fused.

    The weights that are multiplied are bit for bit those that were compressed. Where the product
    is fused, sums are in float32, in an order of its own that depends on the shape of the matrix
    alone: a row of the result has the same bits whatever other rows there are. That order is not
    XLA's, so that results can differ from those of `x @ decompress(a)` in the last bit. Checksums
    are not verified there: of a corrupt payload, what has a wrong header, code or length makes its
    columns NaN.

    It is differentiable with respect to `x`, and works under the same transformations as
    `decompress`, but for `jax.linear_transpose` and `jax.experimental.jet`, which need
    `x @ decompress(a)`, and for second derivatives through a loop, which need `exact=True` where
    the product would be fused. Under `vmap`, mapped rows become rows of `x`.

    Args:
        x: the rows to multiply. Only bfloat16 ones are multiplied by the fused product.
        a: a compressed matrix without stack axes, or a slice of a stack; or several of these. See
            `compress` for the axes that are rows. Of an array, all axes but the last are. If there
            are batch axes, the matrices stand side by side: for `[heads, k, head_dim]`, `n` is
            `heads * head_dim`.

            Of several, up to four neighbours are read by one call: those without stack axes, and
            slices of stacks of one length at one index, which is the same array, or equal integers.
            (Slices that are arguments of a `jax.jit`, `jax.checkpoint` or `jax.lax.cond` have an
            index each in there: make them in there, of one index, or have the function close over
            them.)
        preferred_element_type: bfloat16 or float32, the type of the result; None for the type of
            `x` and the weights together.
        exact: decode first, and use XLA's product: the results are those of plain weights. (So do
            exported programs whose number of rows may be beyond what is fused.)

    Returns:
        The product, `[*batch, n]`; a list of products, if `a` is a sequence.

    Raises:
        IndexError: `a` is a slice at an index, known before the program runs, that the stack lacks.
            (A computed index is clamped to the stack; at -1, the result is not specified.)
        TypeError: `a` is no matrix, or the shapes of one's arrays, or `preferred_element_type`
            another type.
        ValueError: `a` is a stack, consists of several matrices, or does not fit `x`; or its arrays
            do not fit each other.
    """
    if isinstance(a, Sequence):
        return _dot_all(x, a, preferred_element_type, exact)
    return _dot_all(x, [a], preferred_element_type, exact)[0]


def can_fuse(stack: DF11Array, rows: int) -> bool:
    """Whether `dot` may fuse products of so many rows with slices of a stack.

    It may where the program runs on a GPU that can. That is known only when the program is lowered,
    which may be for other devices than those that are here.

    Args:
        stack: the stack, or a matrix.
        rows: the number of rows of x, which are bfloat16.
    """
    return _is_matrix(stack.layout) and _can_fuse(stack) and bool(_platforms(rows))


def is_fused_in(program: jax.stages.Compiled) -> bool:
    """Whether a compiled program has fused products."""
    return f'"{_ffi.PRODUCT_TARGET}"' in (program.as_text() or "")


class _Call(NamedTuple):
    """A call but for its arrays.

    Attributes:
        layouts: the layout of each matrix.
        out_dtype: the dtype of the results.
    """

    layouts: tuple[Layout, ...]
    out_dtype: np.dtype


def _dot_all(x: Array, matrices: Sequence[Matrix], out_type: Any, exact: bool) -> list[Array]:
    x = jnp.asarray(x)
    out_dtype = np.dtype(out_type or jnp.result_type(x, jnp.bfloat16))
    # A weak type, such as that of jnp.full(shape, 1.0), gives way to the weights', as in x @ W.
    rows = x.astype(out_dtype) if x.weak_type and out_type is None else x
    has_kernel = rows.dtype == jnp.bfloat16 and out_dtype in FUSED_TYPES
    if out_type is not None and out_dtype not in FUSED_TYPES:
        raise TypeError(
            f"dot: preferred_element_type has to be bfloat16 or float32, got {out_dtype}"
        )
    if not matrices:
        return []
    first = constant_index(0)
    operands = [_as_operand(matrix, i, first) for i, matrix in enumerate(matrices)]
    for i, a in enumerate(operands):
        k = _matrix_shape(a.stack)[1] if isinstance(a, DF11Slice) else a.shape[0]
        if x.ndim < 1 or x.shape[-1] != k:
            raise ValueError(
                f"dot: x has shape {x.shape}, expected [..., {k}] for matrix {i} of shape {a.shape}"
            )
    slices = [a for a in operands if isinstance(a, DF11Slice)]
    results: list[Array] = []
    # A launch reads matrices of one stack index; others have launches of their own.
    for begin, end in _runs(slices):
        run = slices[begin:end]
        call = _Call(tuple(a.stack.layout for a in run), out_dtype)
        payloads = [
            leaf.reshape(math.prod(a.stack.stack_shape), *leaf.shape[len(a.stack.stack_shape) :])
            for a in run
            for leaf in a.stack.payload
        ]
        index = as_index(run[0].index, math.prod(run[0].stack.stack_shape))
        may_fuse = (
            has_kernel and not exact and not is_split(x) and all(_can_fuse(a.stack) for a in run)
        )
        if may_fuse and _platforms(math.prod(rows.shape[:-1])):
            results += _product(call, rows, index, *payloads)
        else:
            # Without rules of its own: where JAX differentiates a loop twice, it drops those of a
            # custom_jvp, and then stops at the custom_vmap.
            results += _choose(call, (), rows, index, *payloads)
    for i, a in enumerate(operands):
        if not isinstance(a, DF11Slice):
            results.insert(i, jnp.dot(x, a, preferred_element_type=out_type))
    return results


def _as_operand(matrix: Matrix, i: int, index: Int32[Array, ""]) -> DF11Slice | Float[Array, "k n"]:
    matrix = raw_value(matrix)
    if isinstance(matrix, DF11Slice):
        if shape := np.shape(matrix.index):
            raise ValueError(
                f"dot: matrix {i} is of several slices, at an index of shape {shape}: take one "
                "after the other, or decompress them"
            )
        length = check_stacks([matrix.stack], [f"dot: matrix {i}"])
        check_index(matrix.index, length, f"dot: matrix {i}")
        return matrix
    if isinstance(matrix, DF11Array):
        if matrix.stack_shape:
            raise ValueError(
                f"dot: matrix {i} is a stack, {matrix!r}: take a slice of it, or scan over it"
            )
        check_stacks([matrix], [f"dot: matrix {i}"])
        return DF11Slice(matrix, index)
    if is_array(matrix):
        if matrix.ndim < 2:
            raise ValueError(f"dot: matrix {i} is an array of shape {matrix.shape}")
        return matrix.reshape(math.prod(matrix.shape[:-1]), matrix.shape[-1])
    raise TypeError(
        f"dot: matrix {i}: expected a DF11Array, a DF11Slice or an array, got "
        f"{type(matrix).__name__}"
    )


def _runs(slices: Sequence[DF11Slice]) -> list[tuple[int, int]]:
    """Neighbours that one call can read: as many as it takes, of one index and length."""
    runs: list[tuple[int, int]] = []
    for i, a in enumerate(slices):
        if runs:
            first, last = runs[-1]
            if last - first < _MATRICES_PER_CALL and _are_alike(a, slices[first]):
                runs[-1] = (first, i + 1)
                continue
        runs.append((i, i + 1))
    return runs


def _are_alike(a: DF11Slice, b: DF11Slice) -> bool:
    """Whether slices are known to be at the same index, of stacks of the same length."""
    lengths = {math.prod(one.stack.stack_shape) for one in (a, b)}
    are_known = not any(isinstance(one.index, jax.Array) for one in (a, b))
    is_same = a.index is b.index or (are_known and int(a.index) == int(b.index))
    return is_same and len(lengths) == 1


def _is_matrix(layout: Layout) -> bool:
    return 0 < layout.row_axes < len(layout.shape) - layout.batch_axes


def _matrix_shape(stack: DF11Array) -> tuple[int, int, int]:
    """The number of matrices that stand side by side, and K and N of each; of a flat view, too."""
    layout, shape = stack.layout, stack.slice_shape
    if not _is_matrix(layout):
        raise ValueError(
            f"dot: slices of shape {shape} with {layout.batch_axes} batch axes and "
            f"{layout.row_axes} row axes are no matrices: see the arguments of compress"
        )
    axes = (0, layout.batch_axes, layout.batch_axes + layout.row_axes, len(shape))
    batch, rows, cols = (math.prod(shape[i:j]) for i, j in itertools.pairwise(axes))
    return (batch, cols, rows) if layout.along_columns else (batch, rows, cols)


def _can_fuse(stack: DF11Array) -> bool:
    """Whether the kernel reads slices of a stack: matrices, of which one device has all.

    Of an empty stack it would have no slice to read; decoded first, that is zeros.
    """
    view = stack.layout.view
    if view.batch > 1 and (
        view.n % _layout.TILE_COLS or view.batch * view.tiles_n * view.tiles_n >> 32
    ):
        return False
    is_here = jax.sharding.get_abstract_mesh().are_all_axes_manual
    parts = stack.parts if is_here else stack.layout.parts
    is_there = view.size > 0 and math.prod(stack.stack_shape) != 0
    return is_there and not view.is_flat and math.prod(parts) == 1


def _platforms(rows: int) -> tuple[str, ...]:
    """The platforms on which products of so many rows are fused."""
    return _ffi.product_platforms() if holds(lambda: 1 <= rows <= MOST_FUSED_ROWS) else ()


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(call: _Call, x: Array, index: Array, *payloads: Array) -> list[Array]:
    return _batched(call)(x, index, *payloads)


@_product.defjvp
def _product_jvp(call: _Call, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    # The weights are constants. Tangents are multiplied by XLA, which can transpose that.
    x, *others = primals
    return _product(call, x, *others), _decode_first(call, tangents[0], *others)


@functools.lru_cache(256)
def _batched(call: _Call) -> Any:
    """The product under vmap: mapped rows of x become rows, mapped matrices are decoded first."""

    @custom_vmap
    def product(x: Array, index: Array, *payloads: Array) -> list[Array]:
        return _choose(call, _platforms(math.prod(x.shape[:-1])), x, index, *payloads)

    @product.def_vmap
    def rule(size: int, batched: Any, x: Array, *others: Array) -> Any:
        is_x, *are_others = batched
        if any(are_others):
            axes = (0 if is_x else None, *(0 if is_other else None for is_other in are_others))
            out = jax.vmap(functools.partial(_decode_first, call), in_axes=axes)(x, *others)
        else:
            out = product(x, *others)
        return out, [True] * len(out)

    return product


# Under jit even where the caller is not: it would else be compiled each time.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _choose(
    call: _Call, platforms: tuple[str, ...], x: Array, index: Array, *payloads: Array
) -> list[Array]:
    decode_first = functools.partial(_decode_first, call)
    compiled = dict.fromkeys(platforms, functools.partial(_fused, call))
    return jax.lax.platform_dependent(x, index, *payloads, **compiled, default=decode_first)


def _fused(call: _Call, x: Array, index: Array, *payloads: Array) -> list[Array]:
    views = [layout.view for layout in call.layouts]
    batch, x = x.shape[:-1], x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    words = workspace_words(views, x.shape[0])

    def types(*arrays: Array) -> list[Array]:
        results = _decode_first(call, *arrays)
        return [*results, jnp.broadcast_to(results[0][0, 0].astype(jnp.uint32), words)]

    out = result_types(types, x, index, *payloads)
    names = "\n".join(f"matrix {i}" for i in range(len(views)))
    headers = np.concatenate([_layout.pack_header(layout) for layout in call.layouts])
    fused = jax.ffi.ffi_call(_ffi.PRODUCT_TARGET, out)
    payloads = tuple(leaf.reshape(-1, leaf.shape[-1]) for leaf in payloads)
    *results, _ = fused(_in_kernel_order(x), index, *payloads, names=names, headers=headers)
    return [y.reshape(*batch, y.shape[-1]) for y in results]


def _in_kernel_order(x: Array) -> Array:
    """The rows as the kernel reads them, `[ceil(k / 32), rows, 32]`: see product.h."""
    rows, k = x.shape
    x = jnp.pad(x, ((0, 0), (0, -k % 32)))
    return x.reshape(rows, -1, 2, 4, 4).transpose(1, 0, 3, 2, 4).reshape(-1, rows, 32)


def _decode_first(call: _Call, x: Array, index: Array, *payloads: Array) -> list[Array]:
    each = len(_layout.PAYLOAD)
    stacks = [
        DF11Array.from_payload(payloads[each * i : each * (i + 1)], layout)
        for i, layout in enumerate(call.layouts)
    ]
    results = []
    for stack, weights in zip(stacks, decode_slices(stacks, index), strict=True):
        batch, k, n = _matrix_shape(stack)
        matrix = weights.reshape((batch, n, k) if stack.layout.along_columns else (batch, k, n))
        contracted = 2 if stack.layout.along_columns else 1
        if batch == 1:
            matrix, contracted = matrix[0], contracted - 1
        # Of two types, as jax.numpy.dot passes them on: what they become is up to JAX.
        product = jax.lax.dot_general(
            x,
            matrix,
            (((x.ndim - 1,), (contracted,)), ((), ())),
            preferred_element_type=call.out_dtype,
        )
        results.append(product if batch == 1 else product.reshape(*x.shape[:-1], batch * n))
    return results


def workspace_words(views: Sequence[View], rows: int) -> int:
    """A length of the kernel's workspace that is enough: for the sums of every item.

    The kernel needs room for those of groups of items: see xla_ffi/native/cuda/product.h.

    Args:
        views: the views of the matrices.
        rows: the number of rows of x.
    """
    items = 0
    for view in views:
        chunks = min(view.tiles_k, -(-view.chunks // _ITEMS))
        items += view.batch * view.tiles_n * -(-view.tiles_k // chunks)
    return _layout.TILE_COLS * rows * items
