"""The summary of a checkpoint that `df11-jax info` shows, from its headers alone."""

import dataclasses
import math
import re
from typing import Any

from df11_jax._files.source import Source

_NUMBER = re.compile(r"(?<![^./])\d+(?![^./])")


@dataclasses.dataclass
class Group:
    """Tensors whose names differ only in the number of their layer.

    Attributes:
        pattern: their names, with `*` for the number.
        shape: the shape of each.
        dtype: the dtype of each, as safetensors names it.
        format: `"plain"`, or the format of the checkpoint.
        count: the number of tensors.
        nbytes_before: the bytes of all of them without compression.
        nbytes: the bytes that they take in the checkpoint.
    """

    pattern: str
    shape: tuple[int, ...]
    dtype: str
    format: str
    count: int = 0
    nbytes_before: int = 0
    nbytes: int = 0


@dataclasses.dataclass
class Summary:
    """A checkpoint's sizes.

    Attributes:
        path: the path of the checkpoint, as it was given.
        format: the format of the checkpoint, such as `"native"`.
        model_type: the model type that its config.json has, or None.
        groups: its tensors, in their order.
    """

    path: str
    format: str
    model_type: str | None
    groups: list[Group]

    @property
    def tensors(self) -> int:
        """The number of tensors."""
        return sum(group.count for group in self.groups)

    @property
    def weights(self) -> int:
        """The number of elements of all tensors."""
        return sum(group.count * math.prod(group.shape) for group in self.groups)

    @property
    def nbytes_before(self) -> int:
        """The bytes of all tensors without compression."""
        return sum(group.nbytes_before for group in self.groups)

    @property
    def nbytes(self) -> int:
        """The bytes that they take in the checkpoint."""
        return sum(group.nbytes for group in self.groups)

    @property
    def bits_per_weight(self) -> float:
        """The bits in the checkpoint for each element."""
        return 8 * self.nbytes / max(1, self.weights)

    def as_json(self) -> dict[str, Any]:
        """Everything, for `json.dumps`."""
        totals = ("tensors", "weights", "nbytes_before", "nbytes", "bits_per_weight")
        fields = dataclasses.asdict(self)
        groups = fields.pop("groups")
        return {**fields, **{name: getattr(self, name) for name in totals}, "groups": groups}


def summarize(source: Source) -> Summary:
    """Adds up the sizes in the headers.

    Args:
        source: the checkpoint.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    for name, info in source.tensors.items():
        plain = info.stored_nbytes == info.nbytes
        key = (
            _NUMBER.sub("*", name),
            info.shape,
            info.dtype,
            "plain" if plain else source.format,
        )
        group = groups.setdefault(key, Group(*key))
        group.count += 1
        group.nbytes_before += info.nbytes
        group.nbytes += info.stored_nbytes
    model_type = source.model_config().get("model_type")
    return Summary(
        path=str(source.path),
        format=source.format,
        model_type=model_type if isinstance(model_type, str) else None,
        groups=list(groups.values()),
    )
