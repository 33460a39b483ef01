"""Pytrees from checkpoints."""

import os

import jax
import numpy as np
from jaxtyping import Array, PyTree

from df11_jax._array import DF11Array
from df11_jax._brief import brief
from df11_jax._compress import align_layers
from df11_jax._files.source import Source, unchanged
from df11_jax._progress import ProgressBar
from df11_jax._shards import placements
from df11_jax.checkpoints._native_format import NativeCheckpoint
from df11_jax.checkpoints._open import Shapes, open_checkpoint
from df11_jax.checkpoints._tree import Structure, nest
from df11_jax.checkpoints.leaf import load_leaf


def load(
    checkpoint: str | os.PathLike[str] | Source,
    *,
    shapes: Shapes | None = None,
    device: PyTree = None,
    verify: bool = True,
    progress: bool = False,
) -> PyTree:
    """Loads a checkpoint of any format, compressed, onto a device.

    Leaves of native checkpoints, which `save` and `df11-jax compress` write, and of Orbax's come
    back as they were saved. Leaves of other formats are compressed as `compress_params` does it:
    float32 ones stay as they are, and `compress_params(..., cast=True)` can round them. Of any
    format, layers that are kept one by one get arrays of the same shapes, as `compress_params`
    gives them: where they were compressed one by one, zeros are added to the shorter. The leaves
    are loaded one by one, so that the host holds what one of them needs (of a published checkpoint,
    one unit), and the device holds nothing twice. All are from the files that were there when the
    checkpoint was opened, even if others take their places meanwhile.

    Args:
        checkpoint: the path of its directory, file or index; or a checkpoint that is open already.
        shapes: the model's shapes, which only published checkpoints may need; see
            `df11_jax.published.Checkpoint`.
        device: where the leaves are to be: a device or sharding for all, or a tree of them, as for
            `df11_jax.device_put`; None for the default device. What is divided otherwise in the
            checkpoint is compressed anew, on the host, so that each device gets its share alone.
        verify: whether to check leaves that are loaded compressed, by the checksums of their
            chunks; to decode them later finds damage, too, but on a GPU as NaNs, and not where
            `dot` fuses it with the product.
        progress: whether to show a progress bar.

    Returns:
        Arrays and `DF11Array`s by name; nested dicts where names contain `/`.

    Raises:
        FileNotFoundError: nothing is there, or a shard is missing.
        TypeError: `checkpoint` is neither a path nor a checkpoint.
        ValueError: the checkpoint has none of the formats, is of another version, or is damaged, a
            file was changed while it was read, or numpy has no such dtype; the message names the
            file and the leaf. Or a leaf cannot be divided as `device` says; a note names it.
    """
    if isinstance(checkpoint, (str, os.PathLike)):
        source = open_checkpoint(checkpoint, shapes=shapes)
    elif isinstance(checkpoint, Source):
        source = checkpoint
    else:
        raise TypeError(
            "load: expected the path of a checkpoint, or one that open_checkpoint has opened, got "
            f"{brief(checkpoint)}"
        )
    structure = source.structure if isinstance(source, NativeCheckpoint) else Structure()
    where = str(source.path)
    names = list(source.tensors)
    tree = nest({name: name for name in names}, structure, where)  # before anything is read
    places = dict(
        zip(jax.tree.leaves(tree), placements(device, jax.tree.structure(tree)), strict=True)
    )
    for name, info in source.tensors.items():
        if info.numpy_dtype is None:
            raise ValueError(f"{where}: {name}: has the dtype {info.dtype}, which numpy lacks")
    total = sum(info.nbytes for info in source.tensors.values())
    leaves: list[DF11Array | Array | np.ndarray] = []
    with unchanged(source), ProgressBar("load", total, show=progress) as bar:
        for name, info in source.tensors.items():
            leaves.append(load_leaf(source, name, places[name], verify=verify))
            bar.update(name, info.nbytes)
    align_layers(names, leaves)
    return nest(dict(zip(names, leaves, strict=True)), structure, where)
