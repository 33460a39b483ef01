"""`scan_blocks`: `lax.scan` over transformer blocks whose weights stay compressed."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from df11_jax._array import DF11Array, DF11Slice, is_df11
from df11_jax._decode import path_name
from df11_jax._lengths import common_length
from df11_jax._slices import constant_index, decode_slices, tie

Carry = TypeVar("Carry")


def scan_blocks(
    block_fn: Callable[[Carry, Any, Any], tuple[Carry, Any]],
    carry: Carry,
    stacked_params: PyTree,
    xs: PyTree = None,
    *,
    reverse: bool = False,
    lazy: bool = False,
) -> tuple[Carry, PyTree]:
    """Runs a stack of blocks, one after the other, decompressing one block at a time.

    The same as `jax.lax.scan` over the decompressed stack, with the same weights bit for bit, but
    only one block's weights exist decompressed at any time. Call it in a jitted function: outside
    of one, it is compiled each time.

    When differentiated, a block with compressed weights is run again in the backward pass, as under
    `jax.checkpoint`: only its arguments are stored, and it is decompressed once more. The same
    holds when a gradient is differentiated.

    Args:
        block_fn: `block_fn(carry, block_params, x) -> (carry, y)`, where `block_params` has the
            structure of `stacked_params` with the weights of one block, and `x` is a slice of
            `xs`.
        carry: the carry for the first block; each block returns that for the next one.
        stacked_params: a pytree of the weights of all blocks, stacked along the first axis (see
            `stack_axis` of `compress_params` for another one).
            `DF11Array` leaves have exactly one stack axis. Other leaves are arrays, and are
            scanned over as usual.
        xs: further arrays to scan over, such as key-value caches; None for nothing.
        reverse: begin with the last block, as `jax.lax.scan` does.
        lazy: pass compressed weights to `block_fn` as a `DF11Slice` each, for it to `dot`; what
            else it does with them decompresses them there, each time anew.

    Returns:
        The last carry, and the stacked `y`. Like `jax.lax.scan`, the carry that came in if the
        stacks have length 0.

    Raises:
        TypeError: `block_fn` does not return a pair.
        ValueError: there is nothing to scan over, or a leaf cannot be scanned over or differs in
            length; the message has its path.
    """
    stack = _Stack(stacked_params, lambda _: lazy)
    length = _common_length(stack, xs)

    # The index is carried, not scanned over: XLA makes it one with the loop's own counter, and a
    # GPU need not copy it out of an array before each block.
    def body(state: tuple[Any, Carry], step: Any) -> tuple[tuple[Any, Carry], Any]:
        index, carry = state
        plain, x = step
        result = block_fn(carry, stack.block(index, plain, after=carry), x)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"scan_blocks: block_fn must return (carry, y), got {type(result).__name__}"
            )
        carry, y = result
        return (index - 1 if reverse else index + 1, carry), y

    first = constant_index(length - 1 if reverse else 0)
    (_, carry), ys = jax.lax.scan(
        stack.checkpoint(body), (first, carry), (stack.plain, xs), length=length, reverse=reverse
    )
    return carry, ys


def scan_range(
    block_fn: Callable[[Carry, Any, Array], Carry],
    carry: Carry,
    stacked_params: PyTree,
    begin: Int[Array, ""] | int,
    count: int,
    is_lazy: Callable[[DF11Array], bool] = lambda _: False,
) -> tuple[Carry, Int[Array, ""]]:
    """`scan_blocks` for some blocks of a stack, which is not sliced for it.

    Args:
        block_fn: `block_fn(carry, block_params, index) -> carry`, where `index` is that of the
            block in the stack.
        carry: the carry for the first block.
        stacked_params: the weights of all blocks; see `scan_blocks`.
        begin: the index of the first block. If another range comes before, pass the index that
            this one returned: XLA might else decompress or copy the first block here ahead of it,
            and hold that block meanwhile.
        count: the number of blocks.
        is_lazy: tells the leaves that are passed to `block_fn` as a `DF11Slice` each. All others
            are decompressed by one call.

    Returns:
        The last carry, and the index of the block after the last.

    Raises:
        ValueError: the weights are no stack of blocks; see `scan_blocks`.
    """
    stack = _Stack(stacked_params, is_lazy)
    _common_length(stack, None)

    def body(state: tuple[Any, Carry], _: None) -> tuple[tuple[Any, Carry], None]:
        index, carry = state
        plain = [
            jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False, allow_negative_indices=False)
            for leaf in stack.plain
        ]
        carry = block_fn(carry, stack.block(index, plain, after=carry), index)
        return (index + 1, carry), None

    first = jnp.asarray(begin, jnp.int32)
    (end, carry), _ = jax.lax.scan(stack.checkpoint(body), (first, carry), length=count)
    return carry, end


def stack_length(stacked_params: PyTree) -> int:
    """The number of blocks in a stack; raises ValueError like `scan_blocks`."""
    return _common_length(_Stack(stacked_params), None)


class _Stack:
    """Weights of all blocks: those that are decompressed block by block, and others.

    Attributes:
        names: the names of the leaves.
        leaves: all leaves.
        plain: the leaves that are not compressed.
    """

    def __init__(
        self, stacked_params: PyTree, is_lazy: Callable[[DF11Array], bool] = lambda _: False
    ) -> None:
        with_paths, self._treedef = jax.tree.flatten_with_path(stacked_params, is_leaf=is_df11)
        self.names = [path_name(path) for path, _ in with_paths]
        self.leaves = [leaf for _, leaf in with_paths]
        self._compressed = [i for i, leaf in enumerate(self.leaves) if is_df11(leaf)]
        self._plain = [i for i, leaf in enumerate(self.leaves) if not is_df11(leaf)]
        self._lazy = [i for i in self._compressed if is_lazy(self.leaves[i])]
        self._eager = [i for i in self._compressed if i not in self._lazy]
        self.plain = [self.leaves[i] for i in self._plain]

    def block(self, index: Any, plain: list[Any], after: Any) -> Any:
        """The weights of one block, given those that are not compressed."""
        if self._compressed:
            index = tie(index, after)
        stacks = [self.leaves[i] for i in self._eager]
        names = [self.names[i] for i in self._eager]
        by_leaf = dict(zip(self._plain, plain, strict=True))
        by_leaf |= zip(self._eager, decode_slices(stacks, index, names=names), strict=True)
        by_leaf |= {i: DF11Slice(self.leaves[i], index) for i in self._lazy}
        return jax.tree.unflatten(self._treedef, [by_leaf[i] for i in range(len(self.leaves))])

    def checkpoint(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """The same body of a scan. Differentiating it, and its gradient, stores no weights."""
        # The forward pass of a gradient is the body without the outer one of the two.
        return jax.checkpoint(jax.checkpoint(body)) if self._compressed else body


def _common_length(stack: _Stack, xs: PyTree) -> int:
    """The number of blocks; raises ValueError unless all leaves agree."""
    found: list[tuple[str, tuple[int, ...]]] = []
    for name, leaf in zip(stack.names, stack.leaves, strict=True):
        where = f"stacked_params: {name}"
        if isinstance(leaf, DF11Array) and len(leaf.stack_shape) != 1:
            instead = (
                "jax.lax.scan over the others, with a scan_blocks inside, gives it stacks of one"
                if leaf.stack_shape
                else "compress_params(..., stacked=...), with a regular expression that is found "
                "in the path, makes one of a leaf that is stacked"
            )
            raise ValueError(
                f"{where}: expected a DF11Array with exactly one stack axis, the blocks, got "
                f"{len(leaf.stack_shape)} of shape {leaf.stack_shape}: {leaf!r}. {instead}"
            )
        found.append((where, _shape(where, leaf)))
    for path, leaf in jax.tree.leaves_with_path(xs):
        where = f"xs: {path_name(path)}"
        found.append((where, _shape(where, leaf)))
    if not found:
        raise ValueError("scan_blocks has nothing to scan over: stacked_params and xs are empty")
    return common_length(found, "blocks")


def _shape(where: str, leaf: Any) -> tuple[int, ...]:
    shape = leaf.shape if isinstance(leaf, DF11Array) else np.shape(leaf)
    if not shape:
        raise ValueError(f"{where}: expected blocks stacked along the first axis, got a scalar")
    return shape
