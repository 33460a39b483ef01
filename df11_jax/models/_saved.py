"""Parameters that were saved as they were divided, loaded again onto any number of devices.

Leaves whose slices are those of the new number of devices stay as they are stored. The others are
taken apart into the tensors that they were made of, so that they are divided like those of any
checkpoint.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, Shaped

from df11_jax._array import DF11Array, is_df11
from df11_jax._files.safetensors import dtype_name
from df11_jax._files.source import Source, TensorInfo, TensorSource
from df11_jax._host_codec import decode
from df11_jax._host_codec import verify as verify_payload
from df11_jax._layout import Layout
from df11_jax.checkpoints.leaf import LeafSource, load_leaf
from df11_jax.models._config import Config
from df11_jax.models._devices import ParamDevices
from df11_jax.models._layer_types import count_stack
from df11_jax.models._leaf_builders import count_stack_axes, is_candidate_leaf, slice_layout
from df11_jax.models._processes import put_shards
from df11_jax.models._sharding import shard_config, shard_shape
from df11_jax.models._weights import Places, TensorPlace, leaf_shape, list_places

# For each slice of a leaf the one of the saved leaf that it is.
SliceNumbers = Int[np.ndarray, " slices"]


def find_saved(tensors: Mapping[str, TensorInfo], config: Config) -> int | None:
    """The number of devices for which stacks are divided in parameters that were saved.

    Args:
        tensors: the tensors of a checkpoint.
        config: the configuration of the transformer.

    Returns:
        The number of devices, those of each stage if there were some; None if these are no
        parameters as `load_params` returns them, but tensors under Hugging Face's names.

    Raises:
        ValueError: a leaf is missing, not known, of another dtype, or of a shape that it has for no
            number of devices.
    """
    if "embed_tokens" not in tensors:
        return None
    places = _list_leaves(config)
    for name in sorted(places.keys() ^ tensors.keys()):
        what = "is missing" if name in places else "has no place in the model"
        raise ValueError(f"{name}: {what} (a {config.family} transformer, by its config.json)")
    devices = _count_devices(tensors, places, config)
    for name, place in places.items():
        info, expected = tensors[name], leaf_shape(place, config, devices)
        shape = tuple(info.shape)
        if place.is_table and shape:  # divided over the devices of all stages, however many
            of_all = leaf_shape(place, config, max(1, shape[0] // devices) * devices)
            expected = of_all if shape == of_all else expected
        if shape != expected:
            raise ValueError(
                f"{name}: expected shape {list(expected)} for {devices} "
                f"{'devices' if devices > 1 else 'device'}, got {list(shape)}"
            )
        if info.numpy_dtype != place.dtype:
            raise ValueError(f"{name}: expected {dtype_name(name, place.dtype)}, got {info.dtype}")
    return devices


class SavedTensors:
    """The tensors that saved parameters were made of, but for leaves that can stay as they are.

    Attributes:
        fitting: the leaves that can, by name: their slices.
        tensors: the descriptions of the other leaves' tensors by name, those of one leaf after the
            other.
        places: the places of these tensors in the parameters, by name.
    """

    def __init__(
        self,
        source: TensorSource,
        config: Config,
        devices: int,
        target: ParamDevices,
        compress: bool,
    ) -> None:
        """Finds what fits; warns if compressed leaves do not.

        Args:
            source: the saved parameters.
            config: the configuration of the transformer.
            devices: the number of devices that `find_saved` returns.
            target: the devices to load them onto.
            compress: whether leaves are to be compressed.
        """
        self._source = source
        self._config = config
        self._devices = devices
        self._target = target
        self._opened: tuple[str, Any] = "", None
        self.fitting = self._find_fitting(compress)
        self.tensors: dict[str, TensorInfo] = {}
        self.places: dict[str, Places] = {}
        order = {name: i for i, name in enumerate(source.tensors) if name not in self.fitting}
        places = [place for parts in list_places(config).values() for place in parts]
        places = [place for place in places if _name(place) in order]
        for place in sorted(places, key=lambda place: order[_name(place)]):
            within = [str(i) for i in (place.layer, place.expert) if i is not None]
            name = f"{_name(place)}[{', '.join(within)}]"
            nbytes = math.prod(place.shape) * place.dtype.itemsize
            dtype = dtype_name(name, place.dtype)
            self.tensors[name] = TensorInfo(place.shape, dtype, nbytes, nbytes)
            self.places[name] = (place,)

    def load(self, name: str, verify: bool) -> DF11Array | Array | np.ndarray:
        """One of the leaves that fit, on its devices.

        Args:
            name: the name of the leaf.
            verify: whether to check all of it.
        """
        source, numbers, path = self._source, self.fitting[name], name.split("/")
        where = self._target.of(path)
        if isinstance(source, LeafSource) and _are_all(numbers, source.tensors[name]):
            if isinstance(where, NamedSharding):
                return source.load_shards(name, where, verify=verify)
            return load_leaf(source, name, where, verify=verify)
        numbers = self._target.part(path, numbers)
        leaf = self._open(name)
        if not is_df11(leaf):
            return put_shards(leaf[numbers], where)
        payload = [part[numbers] for part in leaf.payload]
        if verify:
            verify_payload(payload, leaf.layout, self._where(name))
        return DF11Array.from_payload([put_shards(part, where) for part in payload], leaf.layout)

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One tensor, put together from its shards."""
        (place,) = self.places[name]
        leaf = self._open(_name(place))
        if place.is_table:
            rows = self._decode(leaf, np.arange(leaf.shape[0]), place)
            return rows.reshape(-1, place.shape[1])[: place.shape[0]]
        if place.layer is None:
            return leaf
        shards, shape = self._shards(place, self._devices)
        copies = shards * math.prod(shape) // math.prod(place.shape)
        layers = count_stack(place.path, self._config)
        different = np.arange(0, shards, copies) * layers + place.layer
        slices = list(self._decode(leaf, different, place))
        if len(slices) == 1:
            return slices[0].T
        # A slice has the axes of the tensor, reversed.
        (axis,) = (i for i, n in enumerate(shape[::-1]) if n < place.shape[::-1][i])
        return np.concatenate(slices, axis).T

    def _find_fitting(self, compress: bool) -> dict[str, SliceNumbers]:
        """The leaves that need not be decoded; warns if compressed ones need it."""
        target, fitting, compressed, divided = self._target, {}, 0, 0
        for name, place in _list_leaves(self._config).items():
            shape = leaf_shape(place, self._config, target.count, target.stages)
            is_wanted = compress and is_candidate_leaf(place.path, shape)
            numbers, layout = self._slice_numbers(place), self._layout(name)
            if is_wanted and layout == slice_layout(place.path, self._source.tensors[name].shape):
                compressed += 1
                divided += numbers is None
            elif is_wanted or layout is not None:
                continue
            if numbers is not None:
                fitting[name] = numbers
        if divided:
            saved = self._source.tensors["embed_tokens"].shape[0]
            before = _describe(saved, saved // self._devices)
            warnings.warn(
                f"{divided} of {compressed} compressed leaves are decompressed on the host, and "
                f"compressed again: they were saved for {before}, and are divided for "
                f"{_describe(target.count, target.stages)} now. To load them as they are, save "
                f"what comes of it, or load them onto {before}",
                stacklevel=4,
            )
        return fitting

    def _slice_numbers(self, place: TensorPlace) -> SliceNumbers | None:
        """The saved slices that a leaf has on its devices; None if it has others there."""
        saved, target = self._source.tensors[_name(place)].shape, self._target
        if place.layer is None:
            wanted = leaf_shape(place, self._config, target.count)
            return np.arange(saved[0]) if tuple(saved) == wanted else None
        before, shape = self._shards(place, self._devices)
        after, other = self._shards(place, target.count // target.stages)
        if shape != other:
            return None
        # As many shards are different, of which several devices may have copies.
        shards = np.arange(after) * before // after
        layers = count_stack(place.path, self._config)
        return (shards[:, None] * layers + np.arange(layers)).reshape(-1)

    def _shards(self, place: TensorPlace, devices: int) -> tuple[int, tuple[int, ...]]:
        return shard_shape(place.shape, place.path, self._config, devices)

    def _layout(self, name: str) -> Layout | None:
        return self._source.layout(name) if isinstance(self._source, LeafSource) else None

    def _open(self, name: str) -> Any:
        """A leaf on the host: a stack of compressed slices, or an array."""
        if self._opened[0] != name:
            self._opened = "", None  # one at a time
            self._opened = name, self._view(name)
        return self._opened[1]

    def _view(self, name: str) -> Any:
        source, layout = self._source, self._layout(name)
        if isinstance(source, LeafSource):
            ndim = len(source.tensors[name].shape) - count_stack_axes(name.split("/"))
            if layout is None or len(layout.shape) == ndim:
                return source.view(name)
        return source.read(name)

    def _decode(
        self, leaf: Any, numbers: SliceNumbers, place: TensorPlace
    ) -> Shaped[np.ndarray, "slices ..."]:
        """Some slices of a leaf; of one expert, if each layer has several."""
        index: Any = numbers if place.expert is None else (numbers, place.expert)
        if not is_df11(leaf):
            return leaf[index]
        payload = [part[index] for part in leaf.payload]
        return decode(payload, leaf.layout, self._where(_name(place)))

    def _where(self, name: str) -> str:
        return f"{self._source.path}: {name}" if isinstance(self._source, Source) else name


def _describe(devices: int, stages: int) -> str:
    in_stages = f" in {stages} stages" if stages > 1 else ""
    return f"{devices} device{'s' if devices > 1 else ''}{in_stages}"


def _name(place: TensorPlace) -> str:
    """The name of the leaf that a tensor belongs to."""
    return "/".join(place.path)


def _list_leaves(config: Config) -> dict[str, TensorPlace]:
    """The place of a tensor in each leaf, by its name."""
    return {_name(place): place for parts in list_places(config).values() for place in parts}


def _are_all(numbers: SliceNumbers, info: TensorInfo) -> bool:
    return np.array_equal(numbers, np.arange(info.shape[0]))


def _count_devices(
    tensors: Mapping[str, TensorInfo], places: Mapping[str, TensorPlace], config: Config
) -> int:
    """The number of devices that stacks are divided for, by the first one; 1 if that is none."""
    for name, place in places.items():
        alone, two = (leaf_shape(place, config, devices)[0] for devices in (1, 2))
        if place.layer is not None and alone < two:
            devices, rest = divmod(tensors[name].shape[0], alone)
            try:
                shard_config(config, devices)
            except ValueError:
                return 1
            return 1 if rest else devices
    return 1
