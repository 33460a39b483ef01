"""`scan_blocks`: `lax.scan` over transformer blocks whose weights stay compressed."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from df11_jax._array import DF11Array, is_df11
from df11_jax._decode import decode_slices, path_name

Carry = TypeVar("Carry")


def scan_blocks(
    block_fn: Callable[[Carry, Any, Any], tuple[Carry, Any]],
    carry: Carry,
    stacked_params: PyTree,
    xs: PyTree = None,
) -> tuple[Carry, PyTree]:
    """Runs a stack of blocks, one after the other, decompressing one block at a time.

    The same as `jax.lax.scan` over the decompressed stack, bit for bit, but only one block's
    weights exist decompressed at any time.

    When differentiated, a block with compressed weights is run again in the backward pass, as under
    `jax.checkpoint`: only what it was called with is stored, and it is decompressed once more.

    Args:
        block_fn: `block_fn(carry, block_params, x) -> (carry, y)`, where `block_params` has the
            structure of `stacked_params` with the weights of one block, and `x` is a slice of
            `xs`.
        carry: what the first block gets; each block returns the next one's.
        stacked_params: pytree of the weights of all blocks, stacked along the first axis.
            `DF11Array` leaves have exactly one stack axis. Other leaves are arrays, and are
            scanned over as usual.
        xs: further arrays to scan over, such as key-value caches; None for nothing.

    Returns:
        The last carry, and the stacked `y`. With stacks of length 0, the carry that came in, like
        `jax.lax.scan`.

    Raises:
        TypeError: `block_fn` does not return a pair.
        ValueError: there is nothing to scan over, or a leaf cannot be scanned over or differs in
            length; the message has its path.
    """
    params_with_paths, treedef = jax.tree.flatten_with_path(stacked_params, is_leaf=is_df11)
    names = [path_name(path) for path, _ in params_with_paths]
    leaves = [leaf for _, leaf in params_with_paths]
    length = _common_length(names, leaves, xs)
    compressed = [i for i, leaf in enumerate(leaves) if is_df11(leaf)]
    plain = [i for i, leaf in enumerate(leaves) if not is_df11(leaf)]

    # The index is carried, not scanned over: XLA makes it one with the loop's own counter, and a
    # GPU need not copy it out of an array before each block.
    def body(state: tuple[Any, Carry], step: Any) -> tuple[tuple[Any, Carry], Any]:
        index, carry = state
        block, x = step
        weights = decode_slices(
            [leaves[i] for i in compressed],
            index,
            names=[names[i] for i in compressed],
            after=carry,
        )
        by_leaf = dict(zip(plain, block, strict=True)) | dict(zip(compressed, weights, strict=True))
        params = jax.tree.unflatten(treedef, [by_leaf[i] for i in range(len(leaves))])
        result = block_fn(carry, params, x)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"scan_blocks: block_fn must return (carry, y), got {type(result).__name__}"
            )
        carry, y = result
        return (index + 1, carry), y

    if compressed:
        # Differentiating would else store the decoded weights of all blocks.
        body = jax.checkpoint(body)
    steps = ([leaves[i] for i in plain], xs)
    (_, carry), ys = jax.lax.scan(body, (jnp.int32(0), carry), steps, length=length)
    return carry, ys


def _common_length(names: list[str], leaves: list[Any], xs: PyTree) -> int:
    """The number of blocks; raises ValueError unless all leaves agree."""
    found: list[tuple[str, int]] = []
    for name, leaf in zip(names, leaves, strict=True):
        where = f"stacked_params: {name}"
        if isinstance(leaf, DF11Array) and len(leaf.stack_shape) != 1:
            raise ValueError(
                f"{where}: expected a DF11Array with exactly one stack axis, the blocks, got "
                f"{len(leaf.stack_shape)} of shape {leaf.stack_shape}: {leaf!r}"
            )
        found.append((where, _length(where, leaf)))
    for path, leaf in jax.tree.leaves_with_path(xs):
        where = f"xs: {path_name(path)}"
        found.append((where, _length(where, leaf)))
    if not found:
        raise ValueError("scan_blocks has nothing to scan over: stacked_params and xs are empty")
    first, length = found[0]
    for where, other in found[1:]:
        if other != length:
            raise ValueError(f"{where}: expected {length} blocks, like {first}, got {other}")
    return length


def _length(where: str, leaf: Any) -> int:
    shape = leaf.shape if isinstance(leaf, DF11Array) else np.shape(leaf)
    if not shape:
        raise ValueError(f"{where}: expected blocks stacked along the first axis, got a scalar")
    return shape[0]
