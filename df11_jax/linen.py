"""`flax.linen` models with compressed parameters.

Every linen module takes a `DF11Array` for a parameter, and decompresses it where `self.param` would
have returned the array. Wrapped classes, which this module makes, do better:
`compressed(Block)` where a block is called by itself, `scan(Block, ...)` in the place of
`nn.scan(Block, ...)`. They decompress a block by one call of the decoder, which XLA cannot move out
of a token loop, and decompress again in the backward pass instead of storing weights. With plain
parameters, and to initialise them, they do what they did before.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

if importlib.util.find_spec("flax") is None:
    raise ImportError('df11_jax.linen needs flax. Install with: pip install "df11_jax[flax]"')

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import lift
from flax.core.scope import Scope, in_filter, subtract_filters, union_filters
from flax.linen import transforms
from jaxtyping import PyTree

from df11_jax import _module_products
from df11_jax._array import DF11Array, DF11Slice, is_df11
from df11_jax._decode import after, decompress_params, path_name
from df11_jax._flax import register_with_flax
from df11_jax._lengths import common_length
from df11_jax._slices import check_stacks, decode_slices, tie

ModuleClass = TypeVar("ModuleClass", bound=Callable[..., nn.Module])
Variables = dict[str, PyTree]  # by collection

# Collections of a scan's body: the stacks, whole, and which of their slices is wanted.
_STACKS, _INDEX = "df11_stacks", "df11_index"


__all__ = ["compressed", "scan"]


def compressed(
    module: ModuleClass, *, methods: Sequence[str] | None = None, fused: bool = False
) -> ModuleClass:
    """The same module class, whose parameters may be compressed.

    A call of a method decompresses all of the module's parameters, those of its submodules
    included, by one call of the decoder, not before the arguments of the method are computed. So
    wrap modules that are called on their own: a transformer block, an embedding, an output layer.
    When differentiated, the method is run again in the backward pass, as under `nn.remat`, and the
    weights are decompressed once more instead of stored.

    Under `nn.scan`, XLA copies a layer's compressed weights before it decompresses them; `scan`
    avoids that.

    Args:
        module: a module class, or a `functools.partial` of one. This can be a class decorator.
        methods: the names of the methods that use parameters; None for `__call__`, as in Flax.
            Their results are arrays, or pytrees of them.
        fused: multiply without decompressing, as `df11_jax.dot` does and where it can, in `Dense`,
            `DenseGeneral`, `Einsum` and `Embed.attend`, be it in submodules. So sums are in another
            order than XLA's. `Embed` looks rows up as `df11_jax.take` does. All other parameters
            are decompressed where they are read, each by a call of its own; so are those of
            `Einsum` and `Embed` under `nn.intercept_methods` in the module's own code, and what
            subclasses multiply by code of their own. What `nn.map_variables` maps in the
            module's own code is still compressed, so do not fuse modules that use it.

    Returns:
        A subclass with the same name, so that parameters keep their paths.

    Raises:
        TypeError: `module` is not a module class, or `methods` no sequence of names.
    """
    return _transform(_decompressing, "", module, methods=methods, fused=fused)


def scan(
    module: ModuleClass,
    *,
    variable_axes: Mapping[Any, Any],
    variable_broadcast: Any = False,
    methods: Sequence[str] | None = None,
    fused: bool = False,
    **options: Any,
) -> ModuleClass:
    """`nn.scan` over layers whose stacked parameters may be compressed.

    Each step decompresses one layer, by one call of the decoder that is given the whole stack and
    the layer's index, not before the carry is computed. When differentiated, the layer is run
    again in the backward pass, as under `nn.remat`, and decompressed once more.

    Args:
        module: a module class, or a `functools.partial` of one.
        variable_axes: see `nn.scan`. Whatever axis it gives to parameters, it is 0 once some are
            compressed: `compress_params(..., stacked=..., stack_axis=...)` brings it to the front.
        variable_broadcast: see `nn.scan`.
        methods: the names of the methods to scan over; None for `__call__`, as in Flax.
        fused: see `compressed`.
        **options: all other options of `nn.scan`.

    Returns:
        A subclass, with the name that `nn.scan` gives it, so that parameters keep their paths.

    Raises:
        TypeError: `module` is not a module class, or `methods` no sequence of names.
        ValueError: a compressed leaf has no stack axis, or a leaf has another number of layers than
            others. This is raised when the module is called; the message has the leaf's path.
    """
    return _transform(
        _scanning,
        "Scan",
        module,
        methods=methods,
        variable_axes=variable_axes,
        variable_broadcast=variable_broadcast,
        fused=fused,
        **options,
    )


def _transform(
    transform: Callable[..., Any], prefix: str, module: Any, methods: Any, **options: Any
) -> Any:
    base = module.func if isinstance(module, functools.partial) else module
    if not (isinstance(base, type) and issubclass(base, nn.Module)):
        raise TypeError(f"expected a class of flax.linen modules, got {module!r}")
    if methods is None:
        methods = ("__call__",)
    if isinstance(methods, (str, Mapping)) or not isinstance(methods, Iterable):
        raise TypeError(f"methods: expected names, such as ('__call__', 'attend'), got {methods!r}")
    transformed = transforms.lift_transform(transform, module, methods=tuple(methods), **options)
    # Modules without a name are called after their class.
    made = transformed.func if isinstance(module, functools.partial) else transformed
    made.__name__ = prefix + base.__name__
    made.__qualname__ = prefix + base.__qualname__
    made.__module__ = base.__module__
    return transformed


def _decompressing(function: Callable[..., Any], fused: bool) -> Callable[..., Any]:
    """The transform behind `compressed`, of functions of scopes as `flax.core.lift` has them."""
    if fused:
        function = _fusing(function)

    def wrapper(scopes: Sequence[Scope], *args: Any, **kwargs: Any) -> Any:
        if not _any_compressed(scopes):
            # In scopes of its own, as below: two methods may both run `setup`, which names things.
            return lift.map_variables(function, ())(scopes, *args, **kwargs)
        path = _common_path(scopes)

        def decompress(variables: Variables, *args: Any, **kwargs: Any) -> Variables:
            tree = after(variables.get("params", {}), (args, kwargs))
            if fused:
                for keys, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_df11):
                    if is_df11(leaf):  # where it is read, errors could not say where it is
                        check_stacks([leaf], [path_name((*path, *keys))])
                return {"params": tree}
            for name in reversed(path):  # the decoder's errors say where a leaf is
                tree = {name: tree}
            tree = decompress_params(tree)
            for name in path:
                tree = tree[name]
            return {"params": tree}

        return _with_variables(function, ("params",), decompress)(scopes, *args, **kwargs)

    return wrapper


def _scanning(
    function: Callable[..., Any],
    variable_axes: Mapping[Any, Any],
    variable_broadcast: Any,
    fused: bool,
    **options: Any,
) -> Callable[..., Any]:
    """The transform behind `scan`."""
    is_stacked = any(in_filter(names, "params") for names in variable_axes)
    is_stacked = is_stacked and not in_filter(variable_broadcast, "params")
    others = {names: axis for names, axis in variable_axes.items() if names != "params"}

    def wrapper(scopes: Sequence[Scope], *args: Any, **kwargs: Any) -> Any:
        if not is_stacked or not _any_compressed(scopes):
            body = _decompressing(function, fused)
            scanned = lift.scan(body, variable_axes, variable_broadcast, **options)
            return scanned(scopes, *args, **kwargs)
        path = _common_path(scopes)
        # lax.scan would slice the stacks, which copies them: they go in whole, with an index.
        collections = ("params", _STACKS, _INDEX)
        take_layer = functools.partial(_take_layer, path, fused)
        inner = _with_variables(_fusing(function) if fused else function, collections, take_layer)
        # Of axes, the first that names a collection counts. The user's filters may name all.
        axes_and_index = {"params": 0, _INDEX: 0, **others}
        broadcast = union_filters(subtract_filters(variable_broadcast, _INDEX), _STACKS)
        carry = subtract_filters(options.get("variable_carry", False), _INDEX)
        options_of_layers = options | {"variable_carry": carry}
        scanned = lift.scan(inner, axes_and_index, broadcast, **options_of_layers)
        split = functools.partial(_split_stacks, path)
        return lift.map_variables(scanned, collections, split)(scopes, *args, **kwargs)

    return wrapper


def _fusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, in which modules multiply with what is still compressed."""

    def wrapper(scopes: Sequence[Scope], *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(_fuse):
            return function(scopes, *args, **kwargs)

    return wrapper


def _fuse(
    method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """Calls a method of a module, with other products if it is one that multiplies."""
    module: Any = context.module
    # Of subclasses, methods that override these are called, and may call them.
    original = getattr(context.orig_method, "func", None)
    if original in _WITH_DOT_GENERAL:
        if module.dot_general is None and module.dot_general_cls is None:
            # Modules are frozen dataclasses; Flax, too, sets fields of theirs in this way.
            object.__setattr__(module, "dot_general", _module_products.dot_general)
            try:
                return method(*args, **kwargs)
            finally:
                object.__setattr__(module, "dot_general", None)
    # Interceptors that are entered in the module's own code come after this one, and are called.
    is_last = method is context.orig_method
    ours = _METHODS.get(original) if is_last else None
    y = None if ours is None else ours(module, *args, **kwargs)
    return method(*args, **kwargs) if y is None else y


def _attend(module: nn.Embed, query: jax.Array) -> jax.Array | None:
    """What `Embed.attend` does, fused; None if it cannot be."""
    promoted: Any = module.promote_dtype(query, module.embedding, dtype=module.dtype)
    x, embedding = promoted
    return _module_products.fused(x, embedding, (((x.ndim - 1,), (1,)), ((), ())))


def _embed(module: nn.Embed, inputs: jax.Array) -> jax.Array | None:
    """What `Embed` does, but for rows that are not wanted; None if they have to be decompressed."""
    is_usual = module.num_embeddings > 1 and module.promote_dtype is nn.Embed.promote_dtype
    if not is_usual or not jnp.issubdtype(inputs.dtype, jnp.integer):
        return None
    rows = _module_products.rows(module.embedding, inputs)
    if rows is None:
        return None
    (promoted,) = module.promote_dtype(rows, dtype=module.dtype, inexact=False)
    return promoted


def _einsum(
    module: nn.Einsum, inputs: jax.Array, einsum_str: str | None = None
) -> jax.Array | None:
    """What `Einsum` does, which lets nobody replace its product, fused; None if it cannot be."""
    if type(module).param is not nn.Module.param:  # which may scale what it reads
        return None
    names = ("kernel", "bias") if module.use_bias else ("kernel",)
    kernel, *bias = (nn.meta.unbox(module.get_variable("params", name)) for name in names)
    # While the module is initialised, there is none; one of another shape is Flax's to refuse.
    if kernel is None or kernel.shape != tuple(module.shape):
        return None
    promoted: Any = module.promote_dtype(inputs, kernel, *bias, dtype=module.dtype)
    x, kernel, *bias = promoted
    subscripts = (einsum_str or module.einsum_str or "").replace(" ", "")
    out_dtype = module.preferred_element_type
    y = _module_products.fused_einsum(subscripts, x, kernel, preferred_element_type=out_dtype)
    if y is None or not bias:
        return y
    operands, _, result = subscripts.partition("->")
    of_kernel = operands.partition(",")[2]
    sizes = [n if label in of_kernel else 1 for label, n in zip(result, y.shape, strict=True)]
    expected = tuple(n for label, n in zip(result, y.shape, strict=True) if label in of_kernel)
    return y + bias[0].reshape(sizes) if bias[0].shape == expected else None


# Methods of Flax's own that multiply by a function which the module has.
_WITH_DOT_GENERAL = {inspect.unwrap(kind.__call__) for kind in (nn.Dense, nn.DenseGeneral)}

# Methods of Flax's own, and what does the same with compressed weights; None where that cannot.
_METHODS: dict[Any, Callable[..., jax.Array | None]] = {
    inspect.unwrap(nn.Einsum.__call__): _einsum,
    inspect.unwrap(nn.Embed.attend): _attend,
    inspect.unwrap(nn.Embed.__call__): _embed,
}


def _with_variables(
    function: Callable[..., Any],
    collections: tuple[str, ...],
    transform: Callable[..., Variables],
) -> Callable[..., Any]:
    """`function` with other variables, which are made again in the backward pass.

    Args:
        function: a function of scopes and any arguments.
        collections: the collections that `transform` gets, and which `function` cannot change.
        transform: a function of these collections and the arguments.
    """

    def wrapper(scopes: Sequence[Scope], *args: Any, **kwargs: Any) -> Any:
        # jax.checkpoint makes tracers of arguments, but `if deterministic:` has to go on working.
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

        def with_arrays(scopes: Sequence[Scope], arrays: dict[int, jax.Array]) -> Any:
            merged = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
            args, kwargs = jax.tree.unflatten(treedef, merged)
            mapped = lift.map_variables(
                function, collections, lambda variables: transform(variables, *args, **kwargs)
            )
            return mapped(scopes, *args, **kwargs)

        # Two of them, for gradients of gradients, too: see `df11_jax._scan`.
        return lift.checkpoint(lift.checkpoint(with_arrays))(scopes, arrays)

    return wrapper


def _split_stacks(path: tuple[str, ...], variables: Variables) -> Variables:
    """Parameters without the compressed ones, and those apart, with the indices of layers."""
    with_paths, treedef = jax.tree.flatten_with_path(variables.get("params", {}), is_leaf=is_df11)
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for keys, leaf in with_paths:
        name = path_name((*path, *keys))
        if is_df11(leaf) and not leaf.stack_shape:
            raise ValueError(
                f"{name}: {leaf!r} has no stack axis, the layers of a scan have one: use "
                "compress_params(..., stacked=...) with a regular expression that its path matches"
            )
        shapes.append((name, tuple(leaf.shape if is_df11(leaf) else jnp.shape(leaf)) or (0,)))
    length = common_length(shapes, "layers") if shapes else 0
    leaves = [leaf for _, leaf in with_paths]
    return {
        "params": jax.tree.unflatten(treedef, [None if is_df11(leaf) else leaf for leaf in leaves]),
        _STACKS: {"leaves": [leaf if is_df11(leaf) else None for leaf in leaves]},
        # A module without parameters, which the scanned one refers to, has no layers.
        _INDEX: {"index": jnp.arange(length, dtype=jnp.int32)} if shapes else {},
    }


def _take_layer(
    path: tuple[str, ...], fused: bool, variables: Variables, carry: Any, *_: Any
) -> Variables:
    """The parameters of one layer, from what `_split_stacks` made; compressed, to be fused."""
    index = variables[_INDEX].get("index")
    with_paths, treedef = jax.tree.flatten_with_path(variables["params"], is_leaf=_is_none)
    leaves = [leaf for _, leaf in with_paths]
    stacks: dict[int, DF11Array] = {}
    for i, stack in enumerate(variables[_STACKS]["leaves"]):
        if is_df11(stack) and len(stack.stack_shape) > 1:
            leaves[i] = stack[index]  # has layers within layers, for another scan to take
        elif is_df11(stack):
            stacks[i] = stack
    names = [path_name((*path, *with_paths[i][0])) for i in stacks]
    if fused:
        check_stacks(list(stacks.values()), names)
        index = tie(index, carry)
        slices = {i: DF11Slice(stack, index) for i, stack in stacks.items()}
        leaves = [slices.get(i, leaf) for i, leaf in enumerate(leaves)]
        return {"params": jax.tree.unflatten(treedef, leaves)}
    weights = decode_slices(list(stacks.values()), index, names=names, after=carry)
    for i, weight in zip(stacks, weights, strict=True):
        leaves[i] = weight
    return {"params": jax.tree.unflatten(treedef, leaves)}


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _any_compressed(scopes: Sequence[Scope]) -> bool:
    parameters = [scope.variables().get("params") for scope in scopes]
    return any(map(is_df11, jax.tree.leaves(parameters, is_leaf=is_df11)))


def _common_path(scopes: Sequence[Scope]) -> tuple[str, ...]:
    """Where the parameters of a module are; of several modules that share theirs, nowhere."""
    return scopes[0].path if len(scopes) == 1 else ()


# To linen, a compressed parameter is a box of metadata, which it opens where a module reads it.
# That is registered as Flax is imported, unless something kept it from being noticed.
register_with_flax()
