"""`flax.nnx` models with compressed parameters.

`compress(model)` compresses a model in place, and `decompress(model)` undoes it. Parameters become
`CompressedParam`s, which modules read as before: each read decompresses, so that in a jitted
function the dense weights are temporary.
"""

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

if importlib.util.find_spec("flax") is None:
    raise ImportError('df11_jax.nnx needs flax. Install with: pip install "df11_jax[flax]"')

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from df11_jax import _decode, _module_products
from df11_jax._array import is_df11, is_df11_or_slice
from df11_jax._compress import align_layers, compress_leaf
from df11_jax._identity import identity
from df11_jax._leaves import plain_shape
from df11_jax._reads import stack_of
from df11_jax._select import MIN_SIZE, Selection

if "graph" not in inspect.signature(nnx.iter_graph).parameters:
    raise ImportError(
        f"df11_jax.nnx needs flax 0.12.5 or newer, found {flax.__version__}: pip install --upgrade "
        "flax. df11_jax.linen does with this one"
    )

__all__ = ["CompressedParam", "compress", "decompress"]


class CompressedParam(nnx.Param[Any]):
    """A parameter whose raw value is a `DF11Array`, and which reads as the bfloat16 array.

    In `scan_blocks(lazy=True)`, the raw value is a `DF11Slice`. It takes all that `nnx.Param` takes
    as well, and is one if it holds a plain array. It has no gradient: filter it out where
    parameters are differentiated or optimised, by this type.
    """

    def get_value(self, **index: Any) -> Any:
        """The array, decompressed, or what `index` selects of it.

        Raises:
            TypeError: an optimizer is to train this parameter, and has made its state of it.
        """
        raw = self.get_raw_value()
        if is_df11_or_slice(raw):
            header = stack_of(raw).payload[0]
            _check_is_weights(header)
            # Parameters of an abstract model read as shapes, as plain ones do.
            is_abstract = isinstance(header, jax.ShapeDtypeStruct)
            weights = jax.eval_shape(_decode.decompress, raw) if is_abstract else raw.unbox()
            return self.copy(weights).get_value(**index)
        return super().get_value(**index)

    def set_value(self, value: Any, **index: Any) -> None:
        """Replaces the value by a plain or compressed array.

        Raises:
            TypeError: only a part of a compressed array is to be replaced.
        """
        if is_df11_or_slice(self.get_raw_value()):
            if index.get("index", ...) is not ...:
                raise TypeError(
                    f"{self.get_raw_value()!r} cannot be changed in place; replace all of it"
                )
            index = {}
        super().set_value(value, **index)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array, which is not decompressed for this."""
        raw = self.get_raw_value()
        return raw.shape if is_df11_or_slice(raw) else super().shape

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What arrays have, such as `.T`, but not what flax or jax merely ask for.
            is_of_arrays = hasattr(jax.Array, name) and not name.startswith("_")
            if not is_of_arrays or not is_df11_or_slice(self.get_raw_value()):
                raise
            return getattr(self.get_value(), name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The types that `compress` makes are in no module.
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *state = reduced
        return _make_param, (_plain_type(type(self)),), *state

    def __nnx_repr__(self) -> Iterator[Any]:
        head, *attributes = self._undecoded().__nnx_repr__()
        yield dataclasses.replace(head, type=type(self).__name__)
        yield from attributes

    def __treescope_repr__(self, path: Any, subtree_renderer: Any) -> Any:
        return self._undecoded().__treescope_repr__(path, subtree_renderer)

    def _undecoded(self) -> nnx.Variable[Any]:
        """A stand-in for printing, which reads as the raw value."""
        return nnx.Param.from_metadata(self.get_raw_value(), self.get_metadata())


def compress(
    model: Any,
    *,
    include: str | None = None,
    stacked: str | None = None,
    predicate: Callable[[str, Any], bool] | None = None,
    min_size: int = MIN_SIZE,
    cast: bool = False,
    fused: bool = False,
    verify: bool = True,
    threads: int | None = None,
) -> None:
    """Compresses the parameters of a model in place, one after the other.

    Each `nnx.Param` that gains from it becomes a `CompressedParam`, wherever the model refers to
    it; so does one that was given a `DF11Array`, by `nnx.update` for instance. All others are left
    as they are, and so are adapters (`nnx.LoRAParam`), which are there to be trained, and what is
    nested in an object of another library, such as the scales of a quantized weight. If this is
    interrupted, the remaining ones are left as well. Parameters that hold one array are compressed
    together, and then hold one `DF11Array`.

    A second call leaves what is compressed as it is, and what is fused remains so. With
    `fused=True`, it fuses products of weights that happen to be compressed as the matrices that it
    would have made of them. To change that, call `decompress` first.

    Args:
        model: an `nnx.Module`, or any container of them.
        include: a regular expression; only parameters in whose path, such as
            `layers/0/attention/query/kernel`, it is found are compressed. None for all.
        stacked: a regular expression for the paths of parameters whose first axis is one of layers,
            as `nnx.vmap` makes them; see `df11_jax.compress_params`, which takes other axes, too.
        predicate: a function of a path and an array, which may refuse parameters that all other
            arguments admit.
        min_size: parameters with fewer weights stay as they are.
        cast: round float32 and float16 to bfloat16 first, which is not lossless.
        fused: multiply without decompressing, as `df11_jax.dot` does and where it can, in
            `nnx.Linear`, `LinearGeneral`, `Einsum` and `Embed.attend`, unless they were given a
            product of another kind; parameters of theirs are then compressed as the matrices that
            they are. So sums are in another order than XLA's. `nnx.Embed` looks rows up as
            `df11_jax.take` does. Under `nnx.jit` alone: elsewhere, what is not needed is
            decompressed nevertheless.
        verify: decode each parameter and compare it bit by bit before going on.
        threads: the number of threads; None for all that this process may run on.

    Raises:
        TypeError: a parameter to be compressed is traced, or a linen module's (`nnx.bridge.ToNNX`);
            `include` or `stacked` is not a string; `model` is no module and has no parameters, such
            as a pytree of arrays.
        ValueError: the parameters of a stack differ in the number of layers; `include` or `stacked`
            is not a regular expression.
        RuntimeError: verification failed, or an array was deleted. All errors about a parameter
            have its path, in their message or in a note.

    Warns:
        UserWarning: no parameter is compressed, and some would have been if they were not float32
            or float16, which Flax makes by default; `include` or `stacked` is found in no path.
    """
    selection = Selection.from_options(
        include=include, stacked=stacked, predicate=predicate, min_size=min_size, cast=cast
    )
    nodes = dict(nnx.iter_graph(model, graph=True))
    params = [
        ("/".join(map(str, path)), param)
        for path, param in nodes.items()
        if isinstance(param, nnx.Param)
        and _is_of_module(path, nodes)
        and not _is_of_linen(path, nodes, selection)
    ]
    # Adapters have shapes of their own.
    shapes = [
        (name, None if isinstance(p, nnx.LoRAParam) else plain_shape(p.get_raw_value()))
        for name, p in params
    ]
    selection.check("df11_jax.nnx.compress", shapes, stacklevel=2)
    # Known before the first array goes: a new one may get the identity of one that is gone.
    tied: dict[Hashable, list[tuple[str, nnx.Param[Any]]]] = {}
    for name, param in params:
        if not param.hijax:
            tied.setdefault(identity(param.get_raw_value()), []).append((name, param))
    seen: list[tuple[str, nnx.Param[Any]]] = []
    matrices = _matrices(nodes) if fused else {}
    for members in tied.values():
        seen += _compress_tied(members, selection, matrices, verify=verify, threads=threads)
    if not params and not isinstance(model, nnx.Module):
        raise TypeError(
            f"expected an nnx.Module, or a container with some, got {type(model).__name__} without "
            "any nnx.Param. For a pytree of arrays there is df11_jax.compress_params"
        )
    names = [name for name, _ in seen]
    values = [param.get_raw_value() for _, param in seen]
    selection.warn_if_futile("df11_jax.nnx.compress", zip(names, values, strict=True), stacklevel=2)
    align_layers(names, values)
    for (_, param), value in zip(seen, values, strict=True):
        if is_df11(value):
            param.set_raw_value(value)
    if fused:
        for module in nodes.values():
            _set_products(module, True)


def decompress(model: Any) -> None:
    """Undoes `compress`: parameters become in place what they were, bit for bit.

    Each `CompressedParam` becomes an `nnx.Param`, or what it was of the user's own types, with the
    whole array on the device. Parameters that hold one `DF11Array` then hold one array.

    Args:
        model: an `nnx.Module`, or any container of them.
    """
    decoded: dict[Hashable, Any] = {}
    for _, node in nnx.iter_graph(model, graph=True):
        _set_products(node, False)
        if not isinstance(node, CompressedParam):
            continue
        value = node.get_raw_value()
        if is_df11(value):
            key = identity(value)
            if key not in decoded:
                decoded[key] = _decode.decompress(value)
            value = decoded[key]
        node.__class__ = _plain_type(type(node))  # type: ignore[assignment]
        node.set_raw_value(value)


def _is_of_module(path: tuple[Any, ...], nodes: Mapping[tuple[Any, ...], Any]) -> bool:
    """Whether a module, or a list or dict, has the parameter at a path.

    Whatever else has parameters, such as a quantized weight, may take their raw values for arrays.
    """
    while path:
        path = path[:-1]
        if not isinstance(nodes[path], (Mapping, list, tuple)):
            return isinstance(nodes[path], nnx.Pytree)
    return True


def _is_of_linen(
    path: tuple[Any, ...], nodes: Mapping[tuple[Any, ...], Any], selection: Selection
) -> bool:
    """Whether a linen module, which does not know a CompressedParam, has the parameter at a path.

    Raises:
        TypeError: it has, and the parameter is to be compressed.
    """
    if not any(isinstance(nodes.get(path[:i]), nnx.bridge.ToNNX) for i in range(len(path))):
        return False
    param, name = nodes[path], "/".join(map(str, path))
    if type(param) is nnx.Param and selection.has(name, param.get_raw_value()):
        raise TypeError(
            f"{name}: is the parameter of a linen module, which does not know a CompressedParam. "
            "nnx.update(model, df11_jax.compress_params(nnx.state(model))) compresses it"
        )
    return True


_PROMOTE_DTYPE = inspect.signature(nnx.Embed.__init__).parameters["promote_dtype"].default


class FusedEmbed(nnx.Embed):
    """An `nnx.Embed` that looks up a few rows, and attends, without decompressing all of it."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """See `nnx.Embed.__call__`."""
        is_usual = out_sharding is None and self.num_embeddings > 1
        is_usual = is_usual and self.promote_dtype is _PROMOTE_DTYPE
        if is_usual and jnp.issubdtype(inputs.dtype, jnp.integer):
            rows = _module_products.rows(self.embedding[...], inputs)
            if rows is not None:
                (promoted,) = self.promote_dtype((rows,), dtype=self.dtype, inexact=False)
                return promoted
        return super().__call__(inputs, out_sharding)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """See `nnx.Embed.attend`."""
        x, embedding = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        summed = ((x.ndim - 1,), (1,))
        y = _module_products.fused(x, embedding, (summed, ((), ())), out_sharding=out_sharding)
        return super().attend(query, out_sharding) if y is None else y


def _matrices(nodes: Mapping[tuple[Any, ...], Any]) -> dict[str, tuple[int, int, bool]]:
    """How the weights of modules are matrices, for the product that they take part in."""
    matrices = {}
    for path, module in nodes.items():
        name, axes = "kernel", None
        if isinstance(module, nnx.Linear):
            axes = _module_products.matrix_axes([0], 2)
        elif isinstance(module, nnx.LinearGeneral) and not module.batch_axis:
            summed = len(module.axis)
            axes = _module_products.matrix_axes(range(summed), summed + len(module.out_features))
        elif isinstance(module, nnx.Einsum):
            found = _module_products.contraction(module.einsum_str)
            axes = found and _module_products.matrix_axes(found.axes, found.ndim)
        elif isinstance(module, nnx.Embed):
            name, axes = "embedding", _module_products.matrix_axes([1], 2)
        if axes is not None:
            matrices["/".join(map(str, (*path, name)))] = axes
    return matrices


# What multiplies in Flax's modules: the type of a module, its attribute, Flax's and ours.
_PRODUCTS = (
    (nnx.Linear, "dot_general", jax.lax.dot_general, _module_products.dot_general),
    (nnx.LinearGeneral, "dot_general", None, _module_products.dot_general),
    (nnx.Einsum, "einsum_op", jnp.einsum, _module_products.einsum),
    (nnx.Embed, "__class__", nnx.Embed, FusedEmbed),
)


def _set_products(module: Any, fused: bool) -> None:
    """Has a module of Flax's multiply by our products or by Flax's own, unless it has others."""
    if not fused and isinstance(module, _FusedWithin):
        object.__setattr__(module, "__class__", type(module).__bases__[0])
    for kind, attribute, plain, ours in _PRODUCTS:
        before, after = (plain, ours) if fused else (ours, plain)
        if not isinstance(module, kind) or getattr(module, attribute, ...) is not before:
            continue
        if attribute == "__class__":  # nnx records the attributes that are set, not this one
            object.__setattr__(module, attribute, after)
        elif type(module).__call__ is kind.__call__:
            setattr(module, attribute, after)
        elif fused and not isinstance(module, _FusedWithin):
            # Its own code may read the attribute, and do something else if that is not Flax's.
            own: Any = type(module)
            object.__setattr__(module, "__class__", _fused_type(own))


class _FusedWithin:
    """A module of a subclass of Flax's: Flax's own method, if it calls that, has our product."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The types that `_fused_type` makes are in no module.
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *state = reduced
        return _make_fused, (type(self).__bases__[0],), *state


def _make_fused(module_type: Any) -> Any:
    return object.__new__(_fused_type(module_type))


@functools.cache
def _fused_type(module_type: type[Any]) -> Any:
    """The type of modules that are of `module_type`, and fuse what that has Flax multiply."""
    last = next(_fused_last(*row) for row in _PRODUCTS if issubclass(module_type, row[0]))
    # A subclass is a pytree unless it says otherwise, even of one that is none.
    is_pytree = getattr(module_type, "_pytree__is_pytree", True)
    options = {} if is_pytree else {"pytree": False}
    # It gets its name afterwards: a base may register its subclasses by their names.
    bases, names = (module_type, last), {"__module__": module_type.__module__}
    made: Any = type(f"Fused{module_type.__name__}", bases, names, **options)
    made.__name__, made.__qualname__ = module_type.__name__, module_type.__qualname__
    return made


@functools.cache
def _fused_last(kind: Any, attribute: str, plain: Any, ours: Any) -> Any:
    """A type that, as a base, comes after all subclasses of a type of Flax's, just before it."""

    class Last(_FusedWithin, kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if getattr(self, attribute) is not plain:
                return super().__call__(*args, **kwargs)
            object.__setattr__(self, attribute, ours)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                object.__setattr__(self, attribute, plain)

    return Last


def _compress_tied(
    params: Sequence[tuple[str, nnx.Param[Any]]],
    selection: Selection,
    matrices: Mapping[str, tuple[int, int, bool]],
    **options: Any,
) -> list[tuple[str, nnx.Param[Any]]]:
    """Compresses parameters that hold one array; returns those that are no adapters."""
    compressed: dict[Any, Any] = {}  # by the number of stack axes, and how it is a matrix
    seen = []
    for name, param in params:
        value = param.get_raw_value()
        is_adapter = isinstance(param, nnx.LoRAParam)  # which is there to be trained
        if selection.has(name, value) and not is_adapter:
            matrix = matrices.get(name)
            way = selection.stack_axes(name), matrix
            if way not in compressed:
                compressed[way] = compress_leaf(name, value, selection, matrix=matrix, **options)
            value = compressed[way]
        if is_df11(value):
            # Other modules may refer to the same parameter, so it has to remain the same object.
            param.__class__ = _compressed_type(type(param))
            param.set_raw_value(value)
        if not is_adapter:
            seen.append((name, param))
    return seen


def _check_is_weights(header: Any) -> None:
    """Raises TypeError for the header of what `jax.tree.map` makes of weights, such as zeros."""
    made = header.dtype != jnp.uint32
    if isinstance(header, jax.Array) and not isinstance(header, jax.core.Tracer):
        # It is small, and jax keeps what it has fetched once.
        made = made or (
            header.is_fully_addressable and header.size > 0 and not np.asarray(header).any()
        )
    if made:
        raise TypeError(
            "compressed weights are frozen, and this is the state that an optimizer made of one. "
            "Optimise what is plain: nnx.Optimizer(model, tx, wrt=nnx.LoRAParam) trains adapters, "
            "wrt=nnx.All(nnx.Param, nnx.Not(df11_jax.nnx.CompressedParam)) all that is not "
            "compressed; include=... of df11_jax.nnx.compress leaves out what is to be trained"
        )


def _make_param(plain_type: type[nnx.Param[Any]]) -> Any:
    return object.__new__(_compressed_type(plain_type))


def _plain_type(param_type: type[nnx.Param[Any]]) -> type[nnx.Param[Any]]:
    """The type of which `_compressed_type` has made this one; a type of the user's own as it is."""
    if param_type is CompressedParam:
        return nnx.Param
    made = param_type.__bases__[:1] == (CompressedParam,) and len(param_type.__bases__) == 2
    return param_type.__bases__[1] if made else param_type


@functools.cache
def _compressed_type(param_type: type[nnx.Param[Any]]) -> type[nnx.Param[Any]]:
    """A type of both kinds, for parameters of the user's own types."""
    if issubclass(param_type, CompressedParam):
        return param_type
    if param_type is nnx.Param:
        return CompressedParam
    name = f"Compressed{param_type.__name__}"
    return type(name, (CompressedParam, param_type), {"__module__": param_type.__module__})
