"""Loading parameters tensor by tensor; each is compressed as soon as it is read."""

import collections
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import BFloat16, Shaped

from df11_jax._bits import first_difference
from df11_jax._files.source import TensorInfo, TensorSource, unchanged
from df11_jax._host_arrays import BFLOAT16
from df11_jax._host_codec import thread_count
from df11_jax._progress import ProgressBar
from df11_jax._select import is_candidate_dtype, is_castable
from df11_jax.models._config import Config
from df11_jax.models._devices import Devices, ParamDevices
from df11_jax.models._layer_types import count_stack
from df11_jax.models._leaf_builders import (
    CompressedLeafBuilder,
    LeafBuilder,
    PlainLeafBuilder,
    is_candidate_leaf,
    transpose,
)
from df11_jax.models._processes import check_same
from df11_jax.models._saved import SavedTensors, find_saved
from df11_jax.models._sharding import split_tensor, table_shape
from df11_jax.models._transformer import Params
from df11_jax.models._weights import (
    Places,
    TensorPlace,
    find_places,
    find_tied_head,
    leaf_shape,
    left_out_parts,
    nest,
    split_rows,
    tensor_shape,
)


def load_params(
    source: TensorSource,
    config: Config,
    *,
    compress: bool = True,
    cast: bool = False,
    verify: bool = True,
    progress: bool = False,
    threads: int | None = None,
    devices: Devices | None = None,
    stages: int = 1,
) -> Params:
    """Loads the parameters of a transformer.

    Tensors are read and compressed one by one, so that beside the result the host needs memory for
    a few of them only. Parameters that were saved compressed stay as they are where their slices
    are those of the devices: all of them, if devices and stages are as many as before, on however
    many hosts. Other leaves are decompressed and compressed again, tensor by tensor, about
    which there is a warning. Of a checkpoint of Orbax, each process then has one compressed leaf
    after the other in host memory, as a whole.

    Args:
        source: the source of the tensors, under Hugging Face's names; or of such parameters, as
            `checkpoints.save` or Orbax wrote them, for as many devices or for others.
        config: the configuration of the transformer.
        compress: False for plain bfloat16 parameters.
        cast: round float32 and float16 tensors to bfloat16, which is not lossless.
        verify: decode each tensor and compare it bit by bit before going on.
        progress: show a progress bar, in bytes.
        threads: the number of threads; None for all that this process may run on.
        devices: the devices to divide them over, or their number; None for the default device
            alone, or if there are several processes, for all devices of all of them. Each process
            has to call this, and reads, compresses and holds what its own devices need.
        stages: the number of stages that layers and devices are divided into, a pipeline; each
            stage is divided over its devices, which are neighbours in the list of all.

    Returns:
        Parameters for `generate`, and if they are on a single device, for `forward`.

    Raises:
        ValueError: a tensor is missing, not known, not bfloat16, or of another shape than it
            should have; a tied head is not the embedding; there are not as many devices, or the
            transformer cannot be divided among them; or processes load different models. The
            message names the tensor.
        RuntimeError: the verification of a tensor, which the message names, failed.
    """
    target = ParamDevices(config, devices, stages)
    same = list(source.tensors.items()), config, compress, cast, stages
    check_same(same, target.of(("embed_tokens",)))
    tensors, fitting = source, []
    if devices_before := find_saved(source.tensors, config):
        tensors = saved = SavedTensors(source, config, devices_before, target, compress)
        places, fitting = saved.places, list(saved.fitting)
    else:
        places = _find_places(source, config, cast)
    total = sum(_nbytes(parts) for parts in places.values())
    total += sum(source.tensors[name].nbytes for name in fitting)
    params: dict[tuple[str, ...], Any] = {}
    with unchanged(source), ProgressBar("load", total, show=progress) as bar:
        for name in fitting:
            params[tuple(name.split("/"))] = saved.load(name, verify)
            bar.update(name, source.tensors[name].nbytes)

        def build(place: TensorPlace) -> LeafBuilder:
            return _make_builder(place, config, target, compress, verify, threads)

        params |= _load_tensors(tensors, places, config, target, build, bar, threads)
    return nest(params)


def _find_places(source: TensorSource, config: Config, cast: bool) -> dict[str, Places]:
    """The places of a checkpoint's tensors, each of which is what its place needs."""
    places = find_places(source.tensors, config)
    if parts := left_out_parts(source.tensors):
        warnings.warn(
            f"the checkpoint has parts that text generation does not need, which are left out: "
            f"{', '.join(parts)}",
            stacklevel=3,
        )
    _check_tensors(source, places, config, cast)
    return places


def _load_tensors(
    source: TensorSource,
    places: Mapping[str, Places],
    config: Config,
    target: ParamDevices,
    make_builder: Callable[[TensorPlace], LeafBuilder],
    bar: ProgressBar,
    threads: int | None,
) -> dict[tuple[str, ...], Any]:
    """The leaves that tensors fill, by path."""
    all_places = [place for parts in places.values() for place in parts]
    builders = {
        path: make_builder(place)
        for path, place in {place.path: place for place in all_places}.items()
    }
    to_come = collections.Counter(place.path for place in all_places)
    params: dict[tuple[str, ...], Any] = {}
    with ThreadPoolExecutor(thread_count(threads)) as pool:
        for name in (name for name in source.tensors if name in places):
            # Layers of other processes' stages are not read.
            if any(_is_here(place, config, target) for place in places[name]):
                tensor = source.read(name)
                for place, rows in zip(places[name], split_rows(tensor, places[name]), strict=True):
                    for start, slices in _slices(place, rows, pool, config, target):
                        builders[place.path].put(start, slices, name)
                        del slices
                del tensor, rows
            to_come.subtract(place.path for place in places[name])
            bar.update(name, _nbytes(places[name]))
            for path in {place.path for place in places[name]}:
                if not to_come[path]:
                    # At once, so that the memory of a builder is freed before other leaves are
                    # filled.
                    params[path] = builders.pop(path).build(target.of(path))
    return params


def _nbytes(places: Places) -> int:
    return sum(2 * math.prod(place.shape) for place in places)


def _make_builder(
    place: TensorPlace,
    config: Config,
    target: ParamDevices,
    compress: bool,
    verify: bool,
    threads: int | None,
) -> LeafBuilder:
    shape = leaf_shape(place, config, target.count, target.stages)
    part = target.part_shape(place.path, shape)
    if compress and is_candidate_leaf(place.path, shape):
        return CompressedLeafBuilder(place.path, part, verify, threads)
    return PlainLeafBuilder(part, place.dtype)


def _check_tensors(
    source: TensorSource, places: Mapping[str, Places], config: Config, cast: bool
) -> None:
    """Raises ValueError if a tensor is not what its place needs."""
    for name, parts in places.items():
        check_tensor(name, parts, source.tensors[name], cast)
    if head := find_tied_head(source.tensors, config):
        _check_tied_head(head, source, places, cast)


def check_tensor(name: str, places: Places, info: TensorInfo, cast: bool) -> None:
    """Raises ValueError if a tensor, by its header, is not what its places need."""
    expected = tensor_shape(places)
    if tuple(info.shape) != expected:
        raise ValueError(f"{name}: expected shape {list(expected)}, got {list(info.shape)}")
    if info.numpy_dtype == places[0].dtype:
        return
    if not is_candidate_dtype(info.numpy_dtype, cast):
        castable = is_castable(info.numpy_dtype)
        hint = ": ask for cast=True (--cast) if rounding is acceptable" if castable else ""
        raise ValueError(f"{name}: expected BF16, got {info.dtype}{hint}")


def _check_tied_head(
    head: str, source: TensorSource, places: Mapping[str, Places], cast: bool
) -> None:
    """Raises ValueError if a tied head is not the embedding.

    Versions of transformers disagree about such a head.
    """
    embedding, table = next((name, parts) for name, parts in places.items() if parts[0].is_table)
    check_tensor(head, table, source.tensors[head], cast)
    both = (source.read(name).astype(BFLOAT16, copy=False) for name in (embedding, head))
    if difference := first_difference(*both):
        raise ValueError(
            f"{head} is not {embedding}, although tie_word_embeddings says so: {difference}. Set "
            "tie_word_embeddings to false in config.json if it is the head, else remove it"
        )


def _is_here(place: TensorPlace, config: Config, target: ParamDevices) -> bool:
    """Whether this process has devices of the stage that a tensor belongs to."""
    if place.layer is None:
        return True
    stage = place.layer * target.stages // count_stack(place.path, config)
    return stage in target.local_stages


def _slices(
    place: TensorPlace,
    tensor: Shaped[np.ndarray, "..."],
    pool: Executor,
    config: Config,
    target: ParamDevices,
) -> Iterator[tuple[int, BFloat16[np.ndarray, "slices ..."]]]:
    """The slices of its leaf that a tensor fills on devices of this process, and their places.

    Rows of matrices are contiguous. The axes of kernels and convolutions are reversed. What other
    processes have is not touched.
    """

    def cast(part: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        return part.astype(place.dtype, copy=False)

    if place.is_table:
        _, rows, _ = table_shape(config, target.count, place.path[0])
        for at, number in enumerate(target.parts(place.path)[1]):
            table = cast(tensor[number * rows : (number + 1) * rows])
            if len(table) < rows:
                table = np.pad(table, ((0, rows - len(table)), (0, 0)))
            yield at, table[None]
    elif place.layer is None:
        yield 0, cast(tensor)
    else:
        layers = count_stack(place.path, config) // target.stages
        stage, layer = divmod(place.layer, layers)
        shards = split_tensor(tensor, place.path, config, target.count // target.stages)
        for i, part in enumerate(target.parts(place.path)[1]):
            number, stage_of_part = divmod(part, target.stages)
            if stage_of_part != stage:
                continue
            shard = cast(shards[number])
            # What was saved is the transpose of a kernel already.
            is_transposed = shard.strides[0] == shard.itemsize
            is_moved = place.is_kernel and not is_transposed
            shard = transpose(shard, pool) if is_moved else shard.T
            at = i * layers + layer
            if place.expert is not None:
                at = at * config.experts.count + place.expert
            yield at, shard[None]
