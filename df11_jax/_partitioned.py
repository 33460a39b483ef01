"""Decoding of sharded tensors where their shards are.

A tensor that is compressed as it lies on a mesh is divided into parts, one for each shard, and the
axes of its five arrays that count the parts stand where the tensor's axes do. So the tensor's
PartitionSpec divides them, and each device decodes the parts that it has: nothing is gathered, and
the weights are laid out as the plain ones would be.

JAX tells in three ways how arrays are divided. With explicit axes of a mesh, their types say it.
With automatic axes, XLA knows it once it has partitioned the program, and asks. In a
`jax.shard_map`, the program sees what one device has, and there is nothing to ask. (If that is over
some axes of a mesh only, and others divide the payload, it is gathered along those.)
"""

import functools
import hashlib
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
from jax.experimental.xla_metadata import set_xla_metadata
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
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        if mesh.explicit_axes:  # which reshapes cannot merge, where they divide an axis
            payloads = tuple(jax.sharding.reshard(part, PartitionSpec()) for part in payloads)
        return decode_local(decoding, index, *payloads)
    with jax.disable_jit(False):
        return _decode_in_place(decoding, index, *payloads)


# Under jit even where the caller is not, or has disabled it: there would be nothing to partition.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _decode_in_place(decoding: Decoding, index: Array, *payloads: Array) -> list[Array]:
    return _mappable(decoding, ())(index, *payloads)


@functools.lru_cache(256)
def _mappable(decoding: Decoding, mapped: tuple[tuple[bool, ...], ...]) -> Any:
    """The decoder, which JAX or XLA partitions.

    Args:
        decoding: what is to be decoded.
        mapped: for each `vmap` around it, the innermost first, whether an argument is mapped.
    """

    def decode(index: Array, *payloads: Array) -> list[Array]:
        function = functools.partial(decode_local, decoding)
        for are_mapped in mapped:
            function = jax.vmap(function, in_axes=tuple(0 if one else None for one in are_mapped))
        return function(index, *payloads)

    def divide(arguments: Sequence[Any], specs: Sequence[Any]) -> list[list[PartitionSpec]]:
        """How arguments and results are to be divided, if arguments are by these PartitionSpecs."""
        into, out = _factors(decoding, mapped, [len(array.shape) for array in arguments])
        divided = {
            factor: axes
            for names, spec in zip(into, specs, strict=True)
            for factor, axes in zip(names, spec, strict=False)
            if _is_divisible(factor) and axes is not None
        }
        return [
            [PartitionSpec(*map(divided.get, names)) for names in arrays] for arrays in (into, out)
        ]

    # XLA ends the process for any exception in these two.
    def partition(mesh: Mesh, arguments: Sequence[Any], results: Any) -> Any:
        del results
        specs = [getattr(array.sharding, "spec", ()) for array in arguments]
        into, out = ([NamedSharding(mesh, s) for s in side] for side in divide(arguments, specs))
        return mesh, decode, out, tuple(into)

    def infer(mesh: Mesh, arguments: Sequence[Any], results: Any) -> Any:
        return partition(mesh, arguments, results)[2]

    partitioned = custom_partitioning(decode)
    partitioned.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=functools.partial(_rule, decoding, mapped),
    )
    # JAX writes the address of a callback into the program, and nothing of what it does: programs
    # that differ in this alone would be one to the cache of compiled programs.
    digest = hashlib.sha256(repr((decoding, mapped)).encode()).hexdigest()

    def decode_on_mesh(*arrays: Array) -> list[Array]:
        mesh = jax.typeof(arrays[1]).sharding.mesh
        if not mesh.explicit_axes:
            with set_xla_metadata(df11_jax=digest):
                return partitioned(*arrays)
        into, out = divide(arrays, [jax.typeof(array).sharding.spec for array in arrays])
        _check_explicit(decoding, arrays, into)
        if not mesh.auto_axes:
            decode_shards = jax.shard_map(
                decode, mesh=mesh, in_specs=tuple(into), out_specs=out, check_vma=False
            )
            return decode_shards(*arrays)

        def decode_automatic(*arrays: Array) -> tuple[Array, ...]:
            with set_xla_metadata(df11_jax=digest):
                return tuple(partitioned(*arrays))

        shardings = tuple(NamedSharding(mesh, spec) for spec in out)
        hide = jax.sharding.auto_axes(axes=mesh.explicit_axes, out_sharding=shardings)
        return list(hide(decode_automatic)(*arrays))

    mappable = custom_vmap(decode_on_mesh)

    @mappable.def_vmap
    def rule(size: int, are_mapped: Sequence[bool], *arrays: Array) -> Any:
        del size
        results = _mappable(decoding, (*mapped, tuple(are_mapped)))(*arrays)
        return results, [True] * len(results)

    return mappable


def _check_explicit(
    decoding: Decoding, arrays: Sequence[Array], specs: Sequence[PartitionSpec]
) -> None:
    """Raises ValueError unless explicit axes divide arguments by these PartitionSpecs."""
    for k, (array, expected) in enumerate(zip(arrays, specs, strict=True)):
        spec = jax.typeof(array).sharding.spec
        if (*spec, *(None,) * (array.ndim - len(spec))) == tuple(expected):
            continue
        if not k:
            raise ValueError(
                f"{decoding.names[0]}: the index is sharded over explicit axes of a mesh by {spec}"
                ", expected it whole on each device: jax.sharding.reshard(index, PartitionSpec())"
            )
        raise ValueError(
            f"{decoding.names[(k - 1) // _EACH]}: its arrays are sharded over explicit axes of a "
            f"mesh by {spec}, expected {expected}: all five alike, along axes of the tensor that "
            "it was compressed for. df11_jax.device_put divides it otherwise"
        )


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

    outermost = range(len(mapped))[::-1]
    levels = [
        tuple(f"v{level}" for level in outermost if mapped[level][k]) for k in range(len(ndims))
    ]
    into, out = [(*levels[0], *undivided(ndims[0] - len(levels[0])))], []
    for i, layout in enumerate(decoding.layouts):
        parts = tuple(f"p{i}_{j}" for j in range(len(layout.parts)))
        batch = undivided(ndims[0] - len(levels[0]))
        for k in range(1 + _EACH * i, 1 + _EACH * (i + 1)):
            stack_axes = ndims[k] - len(levels[k]) - len(parts) - 1
            stack = undivided(stack_axes)
            if decoding.wanted == "all":
                batch = stack = tuple(f"s{i}_{j}" for j in range(stack_axes))
            into.append((*levels[k], *stack, *parts, *undivided(1)))
        out.append((*(f"v{level}" for level in outermost), *batch, *parts))
    return into, out


def _is_divisible(factor: str) -> bool:
    return factor.startswith(("p", "s", "v"))


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
