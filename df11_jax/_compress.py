"""Compression of pytrees, leaf by leaf."""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from df11_jax._array import is_df11
from df11_jax._compress_tensor import as_weights, compress_tensor, encode_tensor
from df11_jax._decode import path_name
from df11_jax._flax import move_names, open_boxes
from df11_jax._identity import identity
from df11_jax._leaves import as_array, is_array, naming, no_pytree, plain_shape
from df11_jax._like import Form, forms_of
from df11_jax._placement import place
from df11_jax._progress import ProgressBar
from df11_jax._select import MIN_SIZE, Selection, is_worth_keeping
from df11_jax._shards import payload_sharding, placements
from df11_jax._stack import fit_exponents


def compress_params(
    params: PyTree,
    *,
    like: PyTree | None = None,
    shardings: PyTree | None = None,
    include: str | None = None,
    stacked: str | None = None,
    stack_axis: int = 0,
    batch_axes: Mapping[str, int] | None = None,
    row_axes: Mapping[str, int] | None = None,
    along_columns: str | None = None,
    predicate: Callable[[str, Any], bool] | None = None,
    min_size: int = MIN_SIZE,
    cast: bool = False,
    verify: bool = True,
    progress: bool = False,
    threads: int | None = None,
) -> PyTree:
    """Compresses the leaves of a pytree for which it is worth it.

    A leaf stays as it is if it is not bfloat16 (but see `cast`), is left out by one of the
    arguments, is compressed already, would not get smaller, or has more than 8 dimensions besides
    its stack axis, which the format cannot hold (`compress` of such an array raises). So does an
    optimizer's state, which is below `opt_state` in a train state. Around leaves that change, a
    box of Flax, such as `nn.Partitioned`, is taken off.

    With `like`, each leaf gets the shapes of the leaf there instead: so that programs that were
    compiled for one checkpoint take another one of the same model.

    Leaves are compressed one by one, so beside `params` and the result the host holds what one
    leaf needs. `params` itself is never changed: if this is interrupted, nothing is lost.

    Tied leaves, which are one array at several paths, are compressed once and stay tied: they
    become one `DF11Array`. Paths that are left out keep the array, and a path at which it is a
    stack gets a `DF11Array` of its own.

    Leaves on a mesh (with a `NamedSharding`) are compressed shard by shard. Each device keeps its
    share, sharded by the same PartitionSpec. Which shards there are is a part of the result: to
    place it in another way, see `df11_jax.device_put`.

    Leaves that are no arrays, such as strings and functions, stay as they are. A Keras variable,
    or whatever else JAX takes for an array (it has `__jax_array__`), is compressed.

    Args:
        params: a pytree of arrays, such as Flax parameters.
        like: the same tree of another checkpoint, compressed; its arrays may be shapes
            (`jax.ShapeDtypeStruct`). A leaf is compressed if it is compressed there, even if that
            makes it larger, and then has arrays of the same shapes; all others stay plain. So
            `include`, `stacked`, `stack_axis`, `batch_axes`, `row_axes`, `along_columns`,
            `predicate` and `min_size` are left out. Where arrays are, `params` says, or
            `shardings`. Leaves of `params` that are compressed already are only made longer or
            shorter.
        shardings: where the leaves are to be, before a stack axis is moved: a sharding or device
            for all, or a tree of them, as for `jax.device_put`; None for where they are. Leaves on
            the host, or elsewhere, are cut on the host, so that no device gets any weights that
            another one holds, or plain ones that it is to hold compressed.
        include: a regular expression; only leaves in whose path (`layers/attention/query`) it is
            found are compressed. None for all.
        stacked: a regular expression; leaves in whose path it is found are stacks, as
            `flax.linen.scan` makes them, and get a stack axis. `scan_blocks` needs it. Leaves whose
            paths are the same as far as it is found are one stack, and have as many layers.
        stack_axis: the axis of stacks that counts their layers; 1 for MaxText (by default) and
            T5X. In the result it is the first axis of all stacks, of those that stay plain, too.
        batch_axes: regular expressions, and how many axes, after that of a stack, count matrices
            where they are found in a path, the first that is found: `{"query": 1}` for kernels
            `[heads, d, head_dim]`.
        row_axes: the same for the axes after these that are the rows of the matrix that `dot`
            multiplies with: `{"query|key|value": 1}` for kernels `[d, heads, head_dim]`. Elsewhere
            all axes but the last are.
        along_columns: a regular expression; leaves in whose path it is found are stored for
            products with their transpose: a table `[vocab, d]` for `h @ E.T`.
        predicate: a function of a path and a leaf, which may refuse leaves that all other
            arguments admit.
        min_size: leaves with fewer weights stay as they are (a stack counts as a whole).
        cast: round float32 and float16 leaves to bfloat16 first, which is not lossless. Those
            that are then not compressed keep their type.
        verify: decode each leaf and compare it bit by bit before going on.
        progress: show a progress bar, in bytes; tied leaves count once.
        threads: the number of threads; None for all that this process may run on.

    Returns:
        The same pytree, with `DF11Array`s for the leaves that are compressed. Layers that are kept
        one by one (leaves of one shape, in whose paths only numbers differ) have arrays of the
        same shapes, so that a program that is compiled for one serves all; leaves that were
        compressed before get zeros at their ends for it, if need be.

    Raises:
        TypeError: `params` is no container and no array, such as a model or a path; a leaf to be
            compressed is traced; a pattern is not a string; `threads` is not an integer.
        ValueError: the leaves of a stack differ in the number of layers; a leaf to be stacked has
            no such axis, or not as many axes as are said; a pattern is not a regular expression; a
            leaf is not divided evenly, or is on several devices and no mesh. Or `like` is another
            tree; a leaf has another shape or type there, is compressed and plain there, or does
            not fit into the arrays there; or there is another argument for what `like` says. Or
            `shardings` lacks keys; or `threads` is below 1.
        RuntimeError: verification failed, or an array was deleted. All errors name the leaf's
            path, in their message or in a note.

    Warns:
        UserWarning: no leaf is compressed, and some would have been if they were not float32 or
            float16, which Flax makes by default; a pattern is found in no path; there are arrays of
            other libraries, such as torch's.
    """
    if like is not None:
        structure = jax.tree.structure(like, is_leaf=is_df11)
        params, like = open_boxes(params), open_boxes(like)
    with_paths, treedef = jax.tree.flatten_with_path(params, is_leaf=is_df11)
    named = [(path_name(path), as_array(leaf)) for path, leaf in with_paths]
    if any(
        not path and not (is_df11(leaf) or is_array(leaf))
        for (path, _), (_, leaf) in zip(with_paths, named, strict=True)
    ):
        raise no_pytree("compress_params", params)
    places = placements(shardings, treedef)
    if like is None:
        selection = Selection.from_options(
            include=include,
            stacked=stacked,
            predicate=predicate,
            min_size=min_size,
            cast=cast,
            stack_axis=stack_axis,
            batch_axes=batch_axes,
            row_axes=row_axes,
            along_columns=along_columns,
        )
        shapes = [(path, plain_shape(leaf)) for path, leaf in named]
        compressed = [path for path, leaf in named if is_df11(leaf)]
        selection.check("compress_params", shapes, compressed=compressed, stacklevel=2)
        selection.warn_of_foreign("compress_params", named, stacklevel=2)
        leaves = compress_leaves(
            named, selection, places, verify=verify, progress=progress, threads=threads
        )
        paths = [path for path, _ in named]
        selection.warn_if_futile("compress_params", zip(paths, leaves, strict=True), stacklevel=2)
    elif (
        any(
            o is not None
            for o in (include, stacked, batch_axes, row_axes, along_columns, predicate)
        )
        or stack_axis != 0
        or min_size != MIN_SIZE
    ):
        raise ValueError(
            "like says which leaves are compressed, and how: leave out include, stacked, "
            "stack_axis, batch_axes, row_axes, along_columns, predicate and min_size"
        )
    else:

        def compress_in_form(path: str, leaf: Any, how: tuple[Form | None, Any]) -> Any:
            form, where = how
            with naming(path):
                if form is None:
                    return place(leaf, where, path)
                if is_df11(leaf):
                    onto = payload_sharding(leaf.layout, leaf.ndim, where)
                    if where is not None and onto is None:
                        raise ValueError(
                            f"{path}: is divided into {list(leaf.layout.parts)} parts, as in like, "
                            f"which {where.spec} does not fit: leave out like or shardings"
                        )
                    return jax.device_put(form.fit(leaf, path), onto)
                weights = as_weights(leaf, path, cast, where=where)
                return encode_tensor(
                    weights, path, form.layout, form, verify=verify, threads=threads
                )

        forms = forms_of(named, treedef, like, cast=cast)
        ways = [
            (form, where) if form or (where is not None and is_array(leaf)) else None
            for (_, leaf), form, where in zip(named, forms, places, strict=True)
        ]
        leaves = _compress_each(named, ways, compress_in_form, progress)
    # What stands for an array, and stays as it is, stays what it was.
    kept = [
        before if after is array else after
        for (_, before), (_, array), after in zip(with_paths, named, leaves, strict=True)
    ]
    if like is not None:
        return jax.tree.unflatten(structure, kept)
    opened = open_boxes(jax.tree.unflatten(treedef, kept), selection.takes_out_of_box)
    moved = {path for path, leaf in named if selection.moves(path, leaf)}
    return move_names(opened, moved, selection.stack_axis)


def compress_leaves(
    named: Sequence[tuple[str, Any]],
    selection: Selection,
    places: Sequence[Any] | None = None,
    *,
    verify: bool = True,
    progress: bool = False,
    threads: int | None = None,
) -> list[Any]:
    """The leaves of a pytree, compressed where the selection says so.

    Args:
        named: paths and leaves.
        selection: the leaves that are to be compressed, and those that are stacks. Stacks that
            stay plain have their stack axis in front, too.
        places: a sharding or device for each; None for where they are.
        verify: see `compress_params`.
        progress: see `compress_params`.
        threads: see `compress_params`.
    """
    hows = []
    for (path, leaf), where in zip(named, places or [None] * len(named), strict=True):
        has = selection.has(path, leaf)
        is_placed = where is not None and (is_array(leaf) or is_df11(leaf))
        is_changed = has or selection.moves(path, leaf) or is_placed
        way = (selection.stack_axes(path), selection.matrix(path), has, where)
        hows.append(way if is_changed else None)

    def compress_or_move(path: str, leaf: Any, how: tuple[Any, Any, bool, Any]) -> Any:
        *_, has, where = how
        if has:
            return compress_leaf(path, leaf, selection, where, verify=verify, threads=threads)
        return _plain(path, leaf, selection, where)

    leaves = _compress_each(named, hows, compress_or_move, progress)
    align_layers([path for path, _ in named], leaves)
    return leaves


def _compress_each(
    named: Sequence[tuple[str, Any]],
    hows: Sequence[Hashable | None],
    compress_one: Callable[[str, Any, Any], Any],
    progress: bool,
) -> list[Any]:
    """The leaves, compressed.

    Args:
        named: paths and leaves.
        hows: how each is to be compressed; None for those that stay as they are. Of tied leaves
            one is compressed, for each of these.
        compress_one: compresses the leaf at a path, as is said there.
        progress: whether to show a progress bar.
    """
    ways = [
        None if how is None else (identity(leaf), how)
        for (_, leaf), how in zip(named, hows, strict=True)
    ]
    to_compress = {way: leaf for (_, leaf), way in zip(named, ways, strict=True) if way}
    compressed: dict[Any, Any] = {}
    total = sum(leaf.nbytes for leaf in to_compress.values())
    with ProgressBar("compress", total, show=progress) as bar:
        for (path, leaf), way in zip(named, ways, strict=True):
            if way and way not in compressed:
                compressed[way] = compress_one(path, leaf, way[1])
                bar.update(path, leaf.nbytes)
    return [compressed[way] if way else leaf for (_, leaf), way in zip(named, ways, strict=True)]


def compress_leaf(
    path: str,
    leaf: Any,
    selection: Selection,
    where: jax.sharding.Sharding | jax.Device | None = None,
    *,
    matrix: tuple[int, int | None, bool] | None = None,
    verify: bool = True,
    threads: int | None = None,
) -> Any:
    """A leaf compressed, or plain if that would not make it smaller; its stack axis is in front.

    Args:
        path: the name of the leaf; errors have it.
        leaf: an array that is one of the selection.
        selection: tells whether the leaf is a stack, and whether to round it to bfloat16.
        where: where it is to be, before the axis is moved; None for where it is.
        matrix: how a slice is a matrix; None for how the selection says.
        verify: see `compress_params`.
        threads: see `compress_params`.
    """
    batch_axes, row_axes, along_columns = selection.matrix(path) if matrix is None else matrix
    with naming(path):
        small = compress_tensor(
            leaf,
            path,
            selection.stack_axes(path),
            verify,
            threads,
            cast=selection.cast,
            axis=selection.stack_axis if selection.moves(path, leaf) else 0,
            where=where,
            batch_axes=batch_axes,
            row_axes=row_axes,
            along_columns=along_columns,
        )
    if is_worth_keeping(small.compressed_nbytes, leaf.nbytes):
        return small
    return _plain(path, leaf, selection, where)


def _plain(path: str, leaf: Any, selection: Selection, where: Any) -> Any:
    """A leaf that stays plain, where it is to be, with its stack axis in front."""
    with naming(path):
        if where is not None:
            leaf = place(leaf, where, path)
        return selection.to_front(path, leaf)


def align_layers(paths: Sequence[str], leaves: list[Any]) -> None:
    """Gives the layers of a model, where they are kept one by one, arrays of the same shapes.

    Otherwise a program would be compiled for each layer whose exponents are of another length. All
    of them take that of the longest, so that each layer costs what the largest does. Lengths go in
    steps of 0.25 % of a tensor, and those of most layers are the same as they are.

    Args:
        paths: the paths of the leaves. Leaves are the same in different layers if their paths
            differ in nothing but numbers. Where a leaf is at paths of several kinds, these are of
            one kind.
        leaves: the leaves, which are replaced one by one, so that no memory holds all of them
            twice. Those that were tied still are. Those of shapes instead of arrays stay.
    """
    groups: dict[Any, Any] = {}  # a group for each kind and each leaf; joined ones lead to another

    def find(key: Any) -> Any:
        root = key
        while (parent := groups.setdefault(root, root)) != root:
            root = parent
        while (parent := groups[key]) != root:  # a model may have tens of thousands of leaves
            groups[key], key = root, parent
        return root

    places: dict[Any, list[int]] = {}  # of each leaf, by its identity
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if is_df11(leaf) and isinstance(leaf.exponents, (jax.Array, np.ndarray)):
            own = identity(leaf)
            places.setdefault(own, []).append(i)
            kind = (re.sub(r"\d+", "", path), leaf.stack_shape, leaf.layout)
            groups[find(kind)] = find(own)
    longest: dict[Any, int] = {}
    for own, members in places.items():
        words = leaves[members[0]].exponents.shape[-1]
        longest[find(own)] = max(longest.get(find(own), 0), words)
    for own, members in places.items():
        fitted = fit_exponents(leaves[members[0]], longest[find(own)])
        for i in members:
            leaves[i] = fitted
