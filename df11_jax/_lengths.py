"""The length that all leaves of a stack have in common, and what to say if they have none."""

import collections
from collections.abc import Sequence

from df11_jax._brief import listed


def common_length(leaves: Sequence[tuple[str, tuple[int, ...]]], unit: str, axis: int = 0) -> int:
    """The length of all leaves along an axis.

    Args:
        leaves: paths, and shapes that have this axis; at least one.
        unit: the name of what is stacked, in the plural.
        axis: the axis.

    Raises:
        ValueError: they differ. The message has the paths and shapes of those that differ from
            most, and the axis along which all agree, if there is one.
    """
    counts = collections.Counter(shape[axis] for _, shape in leaves)
    length = counts.most_common(1)[0][0]
    if len(counts) == 1:
        return length
    like, like_shape = next(leaf for leaf in leaves if leaf[1][axis] == length)
    (path, shape), *others = [leaf for leaf in leaves if leaf[1][axis] != length]
    message = (
        f"{path}: expected {length} {unit}, like {like}, got {shape[axis]}. Along axis {axis} are "
        f"the {unit} of {list(shape)} and {list(like_shape)}"
    )
    if others:
        message += f"; neither fit {listed([f'{path} {list(shape)}' for path, shape in others])}"
    dims = min(len(shape) for _, shape in leaves)
    for along in range(dims):
        if len({shape[along] for _, shape in leaves}) == 1:
            message += (
                f". All agree along axis {along}: if that is the axis of {unit}, bring it to the "
                f"front by compress_params(..., stacked=..., stack_axis={along})"
            )
            break
    raise ValueError(message)
