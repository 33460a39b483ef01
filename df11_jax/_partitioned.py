"""Decoding of sharded tensors where their shards are.

A tensor that is compressed as it lies on a mesh is divided into parts, one for each shard, and the
axes of its five arrays that count the parts stand where the tensor's axes do. So the tensor's
PartitionSpec divides them, and each device decodes the parts that it has: nothing is gathered, and
the weights are laid out as the plain ones would be.

JAX tells in three ways how arrays are divided. With explicit axes of a mesh, their types say it.
With automatic axes, which are the default, XLA knows it once it has partitioned the program, and
asks. In a `jax.shard_map`, the program sees what one device has, and there is nothing to ask. (If
that is over some axes of a mesh only, and others divide the payload, it is gathered along those.)
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, BFloat16, Int32

from df11_jax import _layout
from df11_jax._ffi_call import constant
from df11_jax._local_slices import Decoding, decode_local

_EACH = len(_layout.PAYLOAD)


@constant
def decode_divided(
    decoding: Decoding, index: Int32[Array, "*batch"], *payloads: Array
) -> list[BFloat16[Array, "..."]]:
    """Decodes slices of divided stacks: the same contract as `decode_local`.

    Raises:
        ValueError: stacks are sharded over explicit axes in another way than they were compressed
            for.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        return decode_local(decoding, index, *payloads)
    if jax.typeof(payloads[0]).sharding.mesh.explicit_axes:
        return _decode_explicit(decoding, index, *payloads)
    return _decode_automatic(decoding, index, *payloads)


def _explicit_spec(array: Array) -> tuple[Any, ...]:
    """The explicit axes of a mesh that divide each axis of an array."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def _decode_explicit(
    decoding: Decoding, index: Int32[Array, "*batch"], *payloads: Array
) -> list[BFloat16[Array, "..."]]:
    specs = [_explicit_spec(array) for array in payloads]
    out_specs = []
    for i, (layout, name) in enumerate(zip(decoding.layouts, decoding.names, strict=True)):
        spec, *others = specs[_EACH * i : _EACH * (i + 1)]
        stack_axes = len(spec) - 1 - len(layout.parts)
        is_gathered = not decoding.whole and any(spec[:stack_axes])
        if is_gathered or spec[-1] is not None or any(other != spec for other in others):
            raise ValueError(
                f"{name}: its arrays are sharded over explicit axes of a mesh by "
                f"{PartitionSpec(*spec)}, and can be by a PartitionSpec that divides all five in "
                f"the same way, the axes of {list(layout.shape)} and nothing else. "
                "df11_jax.device_put divides it otherwise"
            )
        batch = spec[:stack_axes] if decoding.whole else (None,) * index.ndim
        out_specs.append(PartitionSpec(*batch, *spec[stack_axes:-1]))
    decode = jax.shard_map(
        functools.partial(decode_local, decoding),
        mesh=jax.typeof(payloads[0]).sharding.mesh,
        in_specs=(PartitionSpec(), *(PartitionSpec(*spec) for spec in specs)),
        out_specs=out_specs,
        check_vma=False,
    )
    return decode(index, *payloads)


# Under jit even where the caller is not: there is nothing to partition otherwise.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _decode_automatic(decoding: Decoding, index: Array, *payloads: Array) -> list[Array]:
    return _automatic(decoding, ())(index, *payloads)


@functools.lru_cache(256)
def _automatic(decoding: Decoding, mapped: tuple[tuple[bool, ...], ...]) -> Any:
    """The decoder, which XLA partitions.

    Args:
        decoding: what is to be decoded.
        mapped: for each `vmap` around it, the innermost first, whether an argument is mapped.
    """

    def decode(index: Array, *payloads: Array) -> list[Array]:
        function = functools.partial(decode_local, decoding)
        for are_mapped in mapped:
            function = jax.vmap(function, in_axes=tuple(0 if one else None for one in are_mapped))
        return function(index, *payloads)

    def partition(mesh: Mesh, arguments: Sequence[Any], results: Any) -> Any:
        del results
        into, out = _factors(decoding, mapped, [len(array.shape) for array in arguments])
        divided = {
            factor: axes
            for names, array in zip(into, arguments, strict=True)
            for factor, axes in zip(names, array.sharding.spec, strict=False)
            if _is_divisible(factor) and axes is not None
        }

        def shardings(arrays: list[tuple[str, ...]]) -> list[NamedSharding]:
            specs = (PartitionSpec(*map(divided.get, names)) for names in arrays)
            return [NamedSharding(mesh, spec) for spec in specs]

        return mesh, decode, shardings(out), tuple(shardings(into))

    partitioned = custom_partitioning(decode)
    partitioned.def_partition(partition, sharding_rule=functools.partial(_rule, decoding, mapped))
    mappable = custom_vmap(lambda *arrays: partitioned(*arrays))

    @mappable.def_vmap
    def rule(size: int, are_mapped: Sequence[bool], *arrays: Array) -> Any:
        del size
        results = _automatic(decoding, (*mapped, tuple(are_mapped)))(*arrays)
        return results, [True] * len(results)

    return mappable


def _factors(
    decoding: Decoding, mapped: Sequence[Sequence[bool]], ndims: Sequence[int]
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Names for the axes of arguments and results: those of one name are divided in the same way.

    Args:
        decoding: what is decoded.
        mapped: see `_automatic`.
        ndims: the number of axes of each argument.
    """
    others = (f"r{i}" for i in itertools.count())

    def undivided(count: int) -> tuple[str, ...]:
        return tuple(itertools.islice(others, count))

    levels = [sum(are_mapped[k] for are_mapped in mapped) for k in range(len(ndims))]
    into, out = [undivided(ndims[0])], []
    for i, layout in enumerate(decoding.layouts):
        parts = tuple(f"p{i}_{j}" for j in range(len(layout.parts)))
        batch = undivided(ndims[0] - levels[0])
        for k in range(1 + _EACH * i, 1 + _EACH * (i + 1)):
            stack_axes = ndims[k] - levels[k] - len(parts) - 1
            stack = undivided(stack_axes)
            if decoding.whole:
                batch = stack = tuple(f"s{i}_{j}" for j in range(stack_axes))
            into.append((*undivided(levels[k]), *stack, *parts, *undivided(1)))
        out.append((*undivided(len(mapped)), *batch, *parts))
    return into, out


def _is_divisible(factor: str) -> bool:
    return factor.startswith(("p", "s"))


def _rule(
    decoding: Decoding,
    mapped: Sequence[Sequence[bool]],
    mesh: Mesh,
    arguments: Sequence[Any],
    results: Sequence[Any],
) -> SdyShardingRule:
    """What Shardy has to know of the axes: those of results are divided as those of parts are.

    Args:
        decoding: what is decoded.
        mapped: see `_automatic`.
        mesh: not used.
        arguments: the types of the arguments.
        results: the types of the results.
    """
    del mesh
    into, out = _factors(decoding, mapped, [len(array.shape) for array in arguments])
    counts = {
        factor: count
        for names, array in zip(into, arguments, strict=True)
        for factor, count in zip(names, array.shape, strict=True)
    }
    within = (f"w{i}" for i in itertools.count())  # the parts
    sizes: dict[str, int] = {}

    def split(factor: str, dim: int) -> str | CompoundFactor:
        count = counts.get(factor, dim)
        if count == dim:
            return factor
        name = next(within)
        if count == 1:
            return name
        sizes[name] = dim // count
        return CompoundFactor(factor, name)

    mappings = [
        ArrayMapping(*map(split, names, array.shape))
        for names, array in zip(out, results, strict=True)
    ]
    # In the order in which Shardy numbers them.
    factors = [factor for names in into for factor in names]
    for axis in itertools.chain(*mappings):
        factors += [axis] if isinstance(axis, str) else axis
    return SdyShardingRule(
        tuple(ArrayMapping(*names) for names in into),
        tuple(mappings),
        need_replication_factors=tuple(
            itertools.filterfalse(_is_divisible, dict.fromkeys(factors))
        ),
        **dict[str, Any](sizes),
    )
