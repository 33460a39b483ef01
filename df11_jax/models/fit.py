"""Whether a model fits on a device, with plain and with compressed weights.

The answer puts three things together: a model, read from its files; the memory of the device, from
`budget`; and the memory that generation needs, from the formulas in `estimate`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from df11_jax._files.directory import read_json
from df11_jax._files.folder import CONFIG, Folder, is_index
from df11_jax._select import is_castable
from df11_jax.checkpoints import Source, TensorInfo, open_checkpoint
from df11_jax.checkpoints.detect import has_weights
from df11_jax.models import estimate
from df11_jax.models._config import Config
from df11_jax.models._hf_config import read_config
from df11_jax.models._hf_fields import UnsupportedModelError
from df11_jax.models._load import check_tensor
from df11_jax.models._saved import find_saved
from df11_jax.models._weights import find_places
from df11_jax.models.budget import Budget

# The largest batch that is looked for.
MOST_SEQUENCES = 2**20


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, as far as it is known without reading its weights.

    Attributes:
        path: the path that was given.
        format: the format of the checkpoint; "config" if there are no weights.
        config: the configuration of the transformer; None if `df11_jax.models` cannot run it.
        reason: the reason why `df11_jax.models` cannot run it, or "".
        parameters: the number of its weights.
        weights: the bytes that the weights take.
        wide: the types of those weights that `--cast` rounds to bfloat16, "float16" and "float32";
            by config.json, if there are no weights. If `config` is known and the weights are plain,
            they are taken to be rounded; otherwise they count as they are.
    """

    path: Path
    format: str
    config: Config | None
    reason: str
    parameters: int
    weights: estimate.WeightBytes
    wide: tuple[str, ...] = ()

    @property
    def is_rounded(self) -> bool:
        """Whether the bytes are those of weights that have been rounded to bfloat16."""
        return bool(self.wide and self.config and not self.weights.exact)


@dataclasses.dataclass(frozen=True)
class Need:
    """The bytes that one device needs, with plain or with compressed weights.

    Attributes:
        weights: the bytes of the weights; the expected bytes if they are not known exactly.
        weights_least, weights_most: the limits within which the expected bytes may lie.
        cache: the bytes of keys and values.
        temporary: the bytes beside weights and cache, at the peak.
        total: the sum of weights, cache and temporary memory.
        fits: whether the total is no more than XLA may allocate.
        free: the rest of the bytes that XLA may allocate; negative if they are too few.
        fraction_needed: the fraction of the memory that XLA would have to allocate from.
        longest_context: the longest context that fits with the batch asked for; None if only the
            weights are known.
        largest_batch: the largest batch that fits with the context asked for; None if only the
            weights are known.
    """

    weights: int
    weights_least: int
    weights_most: int
    cache: int
    temporary: int
    total: int
    fits: bool
    free: int
    fraction_needed: float
    longest_context: int | None
    largest_batch: int | None

    @property
    def fits_at_most(self) -> bool:
        """Whether it fits even if the weights take the most that they may."""
        return self.free >= self.weights_most - self.weights


@dataclasses.dataclass(frozen=True)
class Fit:
    """The answer whether a model fits.

    Attributes:
        model: the model that was asked about.
        budget: the memory of each device.
        devices: the number of devices.
        stages: the number of stages that layers and devices are divided into.
        batch, context: the sizes that were asked for.
        temporary: the parts of temporary memory; None if only the weights are known.
        plain, compressed: the needs of each device.
    """

    model: Model
    budget: Budget
    devices: int
    stages: int
    batch: int
    context: int
    temporary: estimate.Temporary | None
    plain: Need
    compressed: Need

    def as_json(self) -> dict[str, Any]:
        """All of the answer, for `json.dumps`; bytes are those of one device."""
        m, config = self.model, self.model.config
        return {
            "model": str(m.path),
            "model_type": config.family if config else None,
            "format": m.format,
            "only_weights": m.reason or None,
            "parameters": m.parameters,
            "exact": m.weights.exact,
            "wide": m.wide,
            "rounded": m.is_rounded,
            **self.budget._asdict(),
            "usable": self.budget.usable,
            "devices": self.devices,
            "stages": self.stages,
            "batch": self.batch,
            "context": self.context,
            "temporary": self.temporary._asdict() if self.temporary else None,
            "plain": dataclasses.asdict(self.plain),
            "compressed": dataclasses.asdict(self.compressed),
        }


def fit(
    model: Model,
    budget: Budget,
    *,
    batch: int = 1,
    context: int | None = None,
    devices: int = 1,
    stages: int = 1,
) -> Fit:
    """Finds out whether a model fits.

    Args:
        model: the model, from `read_model`.
        budget: the memory of each device.
        batch: the number of sequences.
        context: the number of tokens of each; None for 8,192, or as many as the model allows.
        devices: the number of devices that the model is divided over. The weights of a model that
            `df11_jax.models` cannot run are divided evenly.
        stages: the number of stages that layers and devices are divided into.

    Raises:
        ValueError: the model does not allow such a context, or cannot be divided among as many
            devices and stages; or a number is less than 1.
    """
    config = model.config
    if context is None:
        context = min(8192, config.max_length) if config else 8192
    if config:
        estimate.check_sizes(config, batch, context, devices, stages)
    divided = {"devices": devices, "stages": stages}
    temporary = estimate.estimate_temporary(config, batch, context, **divided) if config else None
    needs = [
        _need(model, budget, batch, context, divided, compressed) for compressed in (False, True)
    ]
    return Fit(model, budget, devices, stages, batch, context, temporary, *needs)


def _need(
    model: Model,
    budget: Budget,
    batch: int,
    context: int,
    divided: Mapping[str, int],
    compressed: bool,
) -> Need:
    config, w = model.config, _shard_weights(model, **divided)
    least, expected, most = (w.least, w.compressed, w.most) if compressed else (w.plain,) * 3

    def beside(batch: int, context: int) -> tuple[int, int]:
        """Cache and temporary memory."""
        if config is None:
            return 0, 0
        cache = estimate.cache_nbytes(config, batch, context, **divided)
        return cache, estimate.estimate_temporary(config, batch, context, **divided).nbytes

    def fits(batch: int, context: int) -> bool:
        return expected + sum(beside(batch, context)) <= budget.usable

    cache, temporary = beside(batch, context)
    total = expected + cache + temporary
    return Need(
        weights=expected,
        weights_least=least,
        weights_most=most,
        cache=cache,
        temporary=temporary,
        total=total,
        fits=total <= budget.usable,
        free=budget.usable - total,
        fraction_needed=total / budget.memory,
        longest_context=longest_context(config, lambda n: fits(batch, n)) if config else None,
        largest_batch=largest_batch(lambda n: fits(n, context)) if config else None,
    )


def _shard_weights(model: Model, devices: int, stages: int) -> estimate.WeightBytes:
    if model.config is None:
        return estimate.WeightBytes(*(-(-nbytes // devices) for nbytes in model.weights))
    return estimate.shard_weights(model.config, model.weights, devices, stages)


def longest_context(config: Config, fits: Callable[[int], bool]) -> int:
    """The longest context that fits, up to the length that the model was made for; 0 if none."""
    return _largest(fits, config.max_length)


def largest_batch(fits: Callable[[int], bool]) -> int:
    """The largest batch that fits; 0 if none does."""
    most = 1
    while most < MOST_SEQUENCES and fits(most):
        most *= 2
    return _largest(fits, most)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where all smaller ones do."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        if fits(middle):
            least = middle
        else:
            most = middle - 1
    return least


def read_model(path: Path) -> Model:
    """Reads all of a model but its weights.

    Args:
        path: the path of a directory as Hugging Face lays it out, with or without weights, of its
            config.json, or of a checkpoint in any format.

    Raises:
        OSError: there is nothing at `path`, or it cannot be read.
        ValueError: a file is damaged, or there is nothing but the configuration of a model that
            `df11_jax.models` cannot run.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: does not exist; expected the directory of a model, its config.json, or a "
            "checkpoint. Of a model on the Hugging Face Hub, config.json is all that is needed"
        )
    if path.suffix == ".json" and not is_index(path.name):
        return _read_config_alone(path, read_json(path))
    folder = Folder(path)
    if not folder.is_file and folder.config and not has_weights(folder):
        return _read_config_alone(folder.directory / CONFIG, folder.config)
    return _read_checkpoint(open_checkpoint(folder), str(folder.directory / CONFIG))


def _read_config_alone(path: Path, fields: Mapping[str, Any]) -> Model:
    try:
        config = read_config(fields, str(path))
    except UnsupportedModelError as error:
        raise ValueError(f"{error}. With its weights, their headers tell what they take") from None
    parts = [part for part in (fields, fields.get("text_config")) if isinstance(part, Mapping)]
    said = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    wide = tuple(name for name in ("float16", "float32") if name in said)
    return _known_model(path, "config", config, wide)


def _read_checkpoint(source: Source, where: str) -> Model:
    path = source.path
    config, reason, names = None, f"{path}: has no {CONFIG}, or an empty one", set(source.tensors)
    saved = None
    if fields := source.model_config():
        try:
            config = read_config(fields, where)
            saved = find_saved(source.tensors, config)
            if not saved:
                places = find_places(source.tensors, config)
                for name, parts in places.items():
                    check_tensor(name, parts, source.tensors[name], cast=True)
                names = set(places)
            reason = ""
        except ValueError as error:
            config, reason = None, str(error)
    infos = [source.tensors[name] for name in names]
    wide = tuple(sorted({str(i.numpy_dtype) for i in infos if is_castable(i.numpy_dtype)}))
    is_plain = all(info.nbytes == info.stored_nbytes for info in infos)
    if config is not None and is_plain:
        return _known_model(path, source.format, config, wide)
    if config is not None and saved:  # with tables that are filled up to whole bands
        parameters = estimate.count_parameters(config)
    else:
        parameters = sum(math.prod(info.shape) for info in infos)
    weights = _weights(infos, is_plain)
    if config is not None and saved:
        # Several devices may have had the same heads, which other numbers of devices have not.
        whole = estimate.estimate_weights(config).plain
        weights = weights.in_proportion(whole, weights.plain)
    return Model(path, source.format, config, reason, parameters, weights, wide)


def _known_model(path: Path, format_: str, config: Config, wide: tuple[str, ...]) -> Model:
    """A model whose weights follow from its configuration."""
    weights = estimate.estimate_weights(config)
    return Model(path, format_, config, "", estimate.count_parameters(config), weights, wide)


def _weights(infos: Sequence[TensorInfo], is_plain: bool) -> estimate.WeightBytes:
    if is_plain:
        return estimate.estimate_tensors(infos)
    plain = sum(info.nbytes for info in infos)
    stored = sum(info.stored_nbytes for info in infos)
    return estimate.WeightBytes(plain, stored, stored, stored)
