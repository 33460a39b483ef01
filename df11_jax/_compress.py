"""Compression on the host, of one tensor or of a pytree leaf by leaf."""

import contextlib
import functools
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jaxtyping import Array, BFloat16, PyTree

from df11_jax._array import DF11Array, is_df11
from df11_jax._decode import decompress, path_name
from df11_jax._flax import open_boxes
from df11_jax._host_arrays import BFLOAT16, to_host
from df11_jax._host_codec import encode
from df11_jax._identity import identity
from df11_jax._layout import Layout, make_layout
from df11_jax._leaves import as_array, is_array, no_pytree, plain_shape
from df11_jax._like import Form, check_is_like, forms_of
from df11_jax._progress import ProgressBar
from df11_jax._select import MIN_SIZE, Selection, is_castable, is_worth_keeping
from df11_jax._shards import (
    Shards,
    divided_as,
    encode_shards,
    payload_sharding,
    placements,
)
from df11_jax._stack import fit_exponents


def compress(
    array: BFloat16[Array, "..."] | BFloat16[np.ndarray, "..."],
    *,
    like: DF11Array | None = None,
    stack_axes: int = 0,
    batch_axes: int = 0,
    row_axes: int | None = None,
    along_columns: bool = False,
    verify: bool = True,
    threads: int | None = None,
) -> DF11Array:
    """Compresses one bfloat16 tensor, on the host.

    A contiguous numpy array, or JAX array on the CPU, is read without a copy. An array on a mesh
    (with a `NamedSharding`) is compressed shard by shard, and each device keeps its share: the
    result is sharded by the same PartitionSpec.

    Args:
        array: a bfloat16 array of any shape, with at most 8 dimensions besides its stack axes.
        like: a compressed tensor, or one of shapes, whose five arrays those of the result are to
            be like, so that what is compiled for it takes the result. It says how the tensor is
            compressed, in place of the next four arguments; `array` says where the result is.
        stack_axes: the number of leading axes that are a stack (of layers, say). Each slice along
            them gets a codebook of its own, and can be decompressed alone.
        batch_axes: the number of the next axes that count matrices: a slice `[heads, d, head_dim]`
            with one of them is `heads` matrices.
        row_axes: the number of axes after these that are the rows of a matrix, for products with
            the compressed weights; the others are its columns. None for all axes but the last.
        along_columns: whether pairs of weights are coded along the columns, for products with the
            transpose (`h @ E.T` with `E [vocab, d]`), instead of along the rows (`x @ W`).
        verify: decode the result, and compare it with `array` bit by bit.
        threads: the number of threads; None for all that this process may run on.

    Returns:
        The compressed tensor, where `array` is; on the default device if that is a numpy array.
        `decompress` of it is `array`, bit for bit.

    Raises:
        TypeError: `array` is traced, or not bfloat16; `like` is not compressed.
        ValueError: `array` has more than 8 dimensions besides its stack axes, or fewer dimensions
            than `stack_axes`; it is on several devices and no mesh; it is of another shape than
            `like`, is sharded otherwise, or does not fit into its arrays; or there is another
            argument for what `like` says.
        RuntimeError: verification failed, which means broken hardware or a bug.
    """
    if like is not None:
        if not is_df11(like):
            raise TypeError(f"like: expected a DF11Array, got {type(like).__name__}")
        if stack_axes or batch_axes or row_axes is not None or along_columns:
            raise ValueError(
                "like says how the tensor is compressed: leave out stack_axes, batch_axes, "
                "row_axes and along_columns"
            )
        weights = _as_weights(array, "array", cast=False)
        check_is_like("array", as_array(array), like, cast=False)
        form = Form.of(like)
        return _encode(weights, "array", form.layout, form, verify=verify, threads=threads)
    return _compress(
        array,
        "array",
        stack_axes,
        verify,
        threads,
        batch_axes=batch_axes,
        row_axes=row_axes,
        along_columns=along_columns,
    )


def compress_params(
    params: PyTree,
    *,
    like: PyTree | None = None,
    shardings: PyTree | None = None,
    include: str | None = None,
    stacked: str | None = None,
    stack_axis: int = 0,
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
            makes it larger, and then has arrays of the same shapes; all others stay plain. So the
            next four arguments are left out. Where arrays are, `params` says, or `shardings`.
            Leaves of `params` that are compressed already are only made longer or shorter.
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
            compressed is traced; `include` or `stacked` is not a string.
        ValueError: the leaves of a stack differ in the number of layers; a leaf to be stacked has
            no such axis; `include` or `stacked` is not a regular expression; a leaf is not divided
            evenly, or is on several devices and no mesh. Or `like` is another
            tree; a leaf has another shape or type there, is compressed and plain there, or does
            not fit into the arrays there; or there is another argument for what `like` says.
        RuntimeError: verification failed, or an array was deleted. All errors name the leaf's
            path, in their message or in a note.

    Warns:
        UserWarning: no leaf is compressed, and some would have been if they were not float32 or
            float16, which Flax makes by default; `include` or `stacked` is found in no path; there
            are arrays of other libraries, such as torch's.
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
    elif (include, stacked, stack_axis, predicate, min_size) != (None, None, 0, None, MIN_SIZE):
        raise ValueError(
            "like says which leaves are compressed: leave out include, stacked, stack_axis, "
            "predicate and min_size"
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
                weights = _as_weights(leaf, path, cast, where=where)
                return _encode(weights, path, form.layout, form, verify=verify, threads=threads)

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
    return open_boxes(jax.tree.unflatten(treedef, kept), selection.takes_out_of_box)


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
        hows.append((selection.stack_axes(path), has, where) if is_changed else None)

    def compress_or_move(path: str, leaf: Any, how: tuple[int, bool, Any]) -> Any:
        _, has, where = how
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
    verify: bool = True,
    threads: int | None = None,
) -> Any:
    """A leaf compressed, or plain if that would not make it smaller; its stack axis is in front.

    Args:
        path: the name of the leaf; errors have it.
        leaf: an array that is one of the selection.
        selection: tells whether the leaf is a stack, and whether to round it to bfloat16.
        where: where it is to be, before the axis is moved; None for where it is.
        verify: see `compress_params`.
        threads: see `compress_params`.
    """
    with naming(path):
        small = _compress(
            leaf,
            path,
            selection.stack_axes(path),
            verify,
            threads,
            cast=selection.cast,
            axis=selection.stack_axis if selection.moves(path, leaf) else 0,
            where=where,
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


@contextlib.contextmanager
def naming(path: str, doing: str = "compressing") -> Iterator[None]:
    """Errors name the leaf: what numpy and jax raise (for deleted arrays, say) does not."""
    try:
        yield
    except Exception as error:
        error.add_note(f"df11_jax: while {doing} the leaf {path}")
        raise


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
        while (parent := groups.setdefault(key, key)) != key:
            key = parent
        return key

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


def _compress(
    array: Any,
    name: str,
    stack_axes: int,
    verify: bool,
    threads: int | None,
    *,
    cast: bool = False,
    axis: int = 0,
    where: Any = None,
    **matrix: Any,
) -> DF11Array:
    weights = _as_weights(array, name, cast, axis, where)
    if isinstance(weights, Shards):
        shape, parts = weights.shape, weights.parts[stack_axes:]
    else:
        shape, parts = weights.array.shape, ()
    if not 0 <= stack_axes <= len(shape):
        raise ValueError(
            f"{name}: cannot take {stack_axes} stack axes from an array of shape {shape}"
        )
    try:
        layout = make_layout(shape[stack_axes:], parts=parts, **matrix)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return _encode(weights, name, layout, verify=verify, threads=threads)


def compress_as(array: Any, layout: Layout, name: str) -> DF11Array:
    """Compresses a tensor as another one was: with the same layout.

    Args:
        array: a bfloat16 array; its axes before those of the layout are a stack.
        layout: the layout of its slices.
        name: the name of the tensor; errors have it.
    """
    return compress_onto(array, layout, None, name)


def compress_onto(array: Any, layout: Layout, where: Any, name: str) -> DF11Array:
    """`compress_as` onto a device or a sharding."""
    return _encode(_as_weights(array, name, cast=False, where=where), name, layout)


def _encode(
    weights: "Whole | Shards",
    name: str,
    layout: Layout,
    form: Form | None = None,
    **options: Any,
) -> DF11Array:
    if isinstance(weights, Shards):
        small = encode_shards(weights, name, layout, **options)
        return small if form is None else form.fit(small, name)
    small = DF11Array.from_payload(encode(weights.array, name, layout, **options), layout)
    if form is not None:
        small = form.fit(small, name)
    return jax.tree.map(lambda array: jax.device_put(array, weights.device), small)


def place(leaf: Any, where: Any, name: str) -> Any:
    """`df11_jax.device_put` of one leaf.

    Args:
        leaf: the leaf; what is neither an array nor compressed stays as it is.
        where: its sharding or device.
        name: the name of the leaf; errors have it.
    """
    if not is_df11(leaf):
        return jax.device_put(leaf, where) if is_array(leaf) else leaf
    onto = payload_sharding(leaf.layout, leaf.ndim, where)
    if onto is not None:
        return jax.device_put(leaf, onto)
    layout = divided_as(leaf.layout, leaf.ndim, where)
    # In host memory, programs compute nothing.
    weights = decompress(jax.device_put(leaf, jax.memory.Space.Device))
    return compress_onto(weights, layout, where, name)


class Whole(NamedTuple):
    """A tensor on the host.

    Attributes:
        array: the weights, in bfloat16 and contiguous.
        device: where the compressed tensor is to be; None for the default device.
    """

    array: np.ndarray
    device: jax.Device | jax.sharding.Sharding | None


def _as_weights(
    array: Any, name: str, cast: bool, axis: int = 0, where: Any = None
) -> Whole | Shards:
    """A tensor to be encoded, in bfloat16.

    Args:
        array: the array, or what stands for one.
        name: the name of the tensor; errors have it.
        cast: whether to round float32 and float16.
        axis: the axis to bring to the front.
        where: where the compressed tensor is to be; None for where the array is.
    """
    array = as_array(array)
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"{name}: compression runs on the host and needs a concrete array, got a traced one "
            f"({array.aval}). Compress outside of jit, and pass the DF11Array in"
        )
    if isinstance(array, DF11Array):
        raise TypeError(f"{name}: is compressed already ({array!r})")
    to_weights = functools.partial(_to_weights, like=array, name=name, cast=cast, axis=axis)
    if where is None and isinstance(array, jax.Array):
        where = array.sharding
        is_default = not array.committed and array.devices() == _default_device()
        if isinstance(where, SingleDeviceSharding):
            (device,) = array.devices()
            where = None if is_default else device
    if isinstance(where, NamedSharding):
        return Shards.of(array, where, axis, to_weights)
    if isinstance(where, jax.sharding.Sharding) and len(where.device_set) > 1:
        raise ValueError(
            f"{name}: expected a NamedSharding, got {type(where).__name__}: bring it onto a mesh "
            "first, jax.device_put(array, NamedSharding(mesh, PartitionSpec(...)))"
        )
    return Whole(to_weights(to_host(array)), where)


def _to_weights(weights: np.ndarray, like: Any, name: str, cast: bool, axis: int) -> np.ndarray:
    """Contiguous bfloat16 weights, of an array (or one shard of it) on the host."""
    if axis:
        weights = np.moveaxis(weights, axis, 0)
    if cast and is_castable(weights.dtype):
        weights = weights.astype(BFLOAT16, order="C")
    if weights.dtype != BFLOAT16:
        if not hasattr(like, "dtype"):
            raise TypeError(
                f"{name}: expected a bfloat16 array, got {type(like).__name__}. "
                "compress_params takes pytrees of arrays"
            )
        raise TypeError(
            f"{name}: expected bfloat16, got {weights.dtype}. "
            "Cast it first, if rounding is acceptable: array.astype(jax.numpy.bfloat16)"
        )
    return np.ascontiguousarray(weights).reshape(weights.shape)


def _default_device() -> set[jax.Device]:
    return jnp.zeros(()).devices()
