"""`after`: compressed weights that are not decompressed before something else is computed."""

import dataclasses

import jax
from jaxtyping import PyTree

from df11_jax._array import is_df11
from df11_jax._decode import is_number


def after(params: PyTree, inputs: PyTree) -> PyTree:
    """The same weights, which are decompressed only once `inputs` have been computed.

    XLA moves a decompression whose operands do not change out of a loop, and would hold all that
    it decompresses. With inputs that change in the loop, such as the last token, it cannot.

    Args:
        params: any pytree; its `DF11Array` leaves are replaced.
        inputs: pytree of arrays; what is not an array is ignored.

    Returns:
        The same pytree. It has a meaning inside of a jitted function only.
    """
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_df11)
    headers = [leaf.header for leaf in leaves if is_df11(leaf)]
    # Without stop_gradient, the barrier would give headers tangents.
    waited = [jax.lax.stop_gradient(x) for x in jax.tree.leaves(inputs) if is_number(x)]
    if not headers or not waited:
        return params
    # The decoder reads the header of a tensor, which is small, before anything else.
    tied = iter(jax.lax.optimization_barrier((headers, waited))[0])
    return jax.tree.unflatten(
        treedef,
        [
            dataclasses.replace(leaf, header=next(tied)) if is_df11(leaf) else leaf
            for leaf in leaves
        ],
    )
