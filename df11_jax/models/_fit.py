"""Whether a model fits on a device: what it would take, and what there is."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from df11_jax import models
from df11_jax._files.directory import CONFIG, ORBAX_METADATA, read_json
from df11_jax.checkpoints import Source, open_checkpoint
from df11_jax.models import _estimate
from df11_jax.models._weights import find_slots

# Of the device's memory that XLA allocates from, unless the first of these that is set says more.
DEFAULT_FRACTION = 0.75
FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# What can be asked for: CUDA itself, its libraries and the display need some, too.
MOST_FRACTION = 0.95


@dataclasses.dataclass(frozen=True)
class Model:
    """What is known of a model.

    Attributes:
        path: as it was given.
        format: of the checkpoint; "config" if there are no weights.
        config: of the decoder; None if `df11_jax.models` cannot run it.
        reason: why it cannot, or "".
        parameters: how many weights it has.
        weights: what they take.
    """

    path: Path
    format: str
    config: models.Config | None
    reason: str
    parameters: int
    weights: _estimate.WeightBytes


class Budget(NamedTuple):
    """Memory of one device.

    Attributes:
        memory: all of it.
        fraction: that XLA allocates from.
        device: its name, if it is here.
    """

    memory: int
    fraction: float
    device: str | None

    @property
    def usable(self) -> int:
        return int(self.memory * self.fraction)


@dataclasses.dataclass(frozen=True)
class Need:
    """What one device needs, with plain or with compressed weights.

    Attributes:
        weights: their bytes; what is not exact is the expected size.
        weights_least, weights_most: where what is expected may lie.
        cache: keys and values.
        temporary: what comes beside both.
        total: of these.
        fits: whether that is no more than XLA may allocate.
        free: what is left of it; negative if it is too little.
        fraction_needed: of the memory, that XLA would have to allocate from.
        longest_context: that fits with the batch asked for; None if only weights are known.
        largest_batch: that fits with the context asked for; None likewise.
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
        """Whether it fits even if weights take the most they may."""
        return self.free >= self.weights_most - self.weights


@dataclasses.dataclass(frozen=True)
class Fit:
    """An answer.

    Attributes:
        model: that was asked about.
        budget: of each device.
        devices: how many there are.
        batch, context: that were asked for.
        temporary: the parts of temporary memory; None if only weights are known.
        plain, compressed: the needs of each device.
    """

    model: Model
    budget: Budget
    devices: int
    batch: int
    context: int
    temporary: _estimate.Temporary | None
    plain: Need
    compressed: Need

    def as_json(self) -> dict[str, Any]:
        """Everything, for `json.dumps`; bytes are those of one device."""
        m, config = self.model, self.model.config
        return {
            "model": str(m.path),
            "model_type": config.family if config else None,
            "format": m.format,
            "only_weights": m.reason or None,
            "parameters": m.parameters,
            "exact": m.weights.exact,
            **self.budget._asdict(),
            "usable": self.budget.usable,
            "devices": self.devices,
            "batch": self.batch,
            "context": self.context,
            "temporary": self.temporary._asdict() if self.temporary else None,
            "plain": dataclasses.asdict(self.plain),
            "compressed": dataclasses.asdict(self.compressed),
        }


def fit(
    model: Model, budget: Budget, *, batch: int = 1, context: int | None = None, devices: int = 1
) -> Fit:
    """Says whether a model fits.

    Args:
        model: from `read_model`.
        budget: memory of each device.
        batch: how many sequences.
        context: tokens of each; None for 8,192, or as many as the model allows.
        devices: that the model is divided over; of an unknown one, evenly.

    Raises:
        ValueError: the model does not allow such a context, or cannot be divided among as many
            devices; or a number is less than 1.
    """
    config = model.config
    if context is None:
        context = min(8192, config.max_length) if config else 8192
    if config:
        _estimate.check_sizes(config, batch, context, devices)
    temporary = (
        _estimate.estimate_temporary(config, batch, context, devices=devices) if config else None
    )
    needs = [
        _need(model, budget, batch, context, devices, compressed) for compressed in (False, True)
    ]
    return Fit(model, budget, devices, batch, context, temporary, *needs)


def _need(
    model: Model, budget: Budget, batch: int, context: int, devices: int, compressed: bool
) -> Need:
    config, w = model.config, _share_weights(model, devices)
    least, expected, most = (w.least, w.compressed, w.most) if compressed else (w.plain,) * 3

    def beside(batch: int, context: int) -> tuple[int, int]:
        """Cache and temporary memory."""
        if config is None:
            return 0, 0
        cache = _estimate.cache_nbytes(config, batch, context, devices)
        return cache, _estimate.estimate_temporary(config, batch, context, devices=devices).nbytes

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
        longest_context=_estimate.longest_context(config, lambda n: fits(batch, n))
        if config
        else None,
        largest_batch=_estimate.largest_batch(lambda n: fits(n, context)) if config else None,
    )


def _share_weights(model: Model, devices: int) -> _estimate.WeightBytes:
    if model.config is None:
        return _estimate.WeightBytes(*(-(-nbytes // devices) for nbytes in model.weights))
    return _estimate.share_weights(model.config, model.weights, devices)


def read_model(path: Path) -> Model:
    """What can be known of a model without reading its weights.

    Args:
        path: of a directory as Hugging Face lays it out, with or without weights, of its
            config.json, or of a checkpoint in any format.

    Raises:
        OSError: there is nothing at `path`, or it cannot be read.
        ValueError: it is damaged, or there is nothing but the configuration of a model that
            `df11_jax.models` cannot run.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: does not exist; expected the directory of a model, its config.json, or a "
            "checkpoint. Of a model on the Hugging Face Hub, config.json is all that is needed"
        )
    if path.suffix == ".json":
        return _read_config_alone(path, read_json(path))
    config_path = (path if path.is_dir() else path.parent) / CONFIG
    fields = read_json(config_path) if config_path.is_file() else None
    if path.is_dir() and fields is not None and not _has_weights(path):
        return _read_config_alone(config_path, fields)
    return _read_checkpoint(path, fields, str(config_path))


def read_budget(memory: int | None) -> Budget:
    """The memory that there is on each device.

    Args:
        memory: all that a device has; None to ask the default one.

    Raises:
        ValueError: it is to be asked, but is no GPU; or the environment has a fraction that is
            none.
    """
    fraction = _read_fraction(os.environ)
    if memory is not None:
        return Budget(memory, fraction, None)
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform == "gpu" else None
    if not stats or "bytes_limit" not in stats:
        raise ValueError(
            f"the default device, {device.device_kind}, is no GPU that tells its memory: say how "
            "much there is, with --memory 24GB"
        )
    return Budget(round(stats["bytes_limit"] / fraction), fraction, device.device_kind)


def _read_fraction(environment: Mapping[str, str]) -> float:
    for name in FRACTION_VARIABLES:
        if text := environment.get(name):
            try:
                fraction = float(text)
            except ValueError:
                fraction = math.nan
            if not 0 < fraction <= 1:
                raise ValueError(f"{name} is {text!r}, expected a fraction of the device's memory")
            return fraction
    return DEFAULT_FRACTION


def _has_weights(path: Path) -> bool:
    return (path / ORBAX_METADATA).exists() or any(path.glob("*.safetensors"))


def _read_config_alone(path: Path, fields: Mapping[str, Any]) -> Model:
    try:
        config = models.read_config(fields, str(path))
    except models.UnsupportedModelError as error:
        raise ValueError(f"{error}. With its weights, their headers tell what they take") from None
    return _known_model(path, "config", config)


def _read_checkpoint(path: Path, fields: Mapping[str, Any] | None, where: str) -> Model:
    source = open_checkpoint(path)
    config, reason, names = None, f"{path}: has no {CONFIG}", set(source.tensors)
    if fields is not None:
        try:
            config = models.read_config(fields, where)
            names = set(find_slots(source.tensors, config))
            reason = ""
        except ValueError as error:
            config, reason = None, str(error)
    if config is not None and source.format == "plain":
        return _known_model(path, "plain", config)
    infos = [source.tensors[name] for name in names]
    parameters = sum(math.prod(info.shape) for info in infos)
    return Model(path, source.format, config, reason, parameters, _weights(source, names))


def _known_model(path: Path, format_: str, config: models.Config) -> Model:
    """A model whose weights the configuration tells."""
    weights = _estimate.estimate_weights(config)
    return Model(path, format_, config, "", _estimate.count_parameters(config), weights)


def _weights(source: Source, names: set[str]) -> _estimate.WeightBytes:
    infos = [source.tensors[name] for name in names]
    if source.format == "plain" or all(info.nbytes == info.stored_nbytes for info in infos):
        return _estimate.estimate_tensors(infos)
    plain = sum(info.nbytes for info in infos)
    stored = sum(info.stored_nbytes for info in infos)
    return _estimate.WeightBytes(plain, stored, stored, stored)
