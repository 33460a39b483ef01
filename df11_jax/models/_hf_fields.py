"""The fields of a Hugging Face `config.json`, read with messages that name them."""

import sys
from collections.abc import Mapping
from typing import Any

from df11_jax._brief import brief

# Larger sizes are mistakes, which would otherwise come to light only after much time and memory.
MOST, MOST_LAYERS = 2**24, 10_000


class UnsupportedModelError(ValueError):
    """A model that this package cannot run; the message names what is not supported about it."""


class Fields:
    """A JSON object whose fields are read with messages that name them."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self._fields = fields
        self.where = where

    def get(self, name: str) -> Any:
        return self._fields.get(name)

    def size(
        self, name: str, default: int | None = None, *, least: int = 1, most: int = MOST
    ) -> int:
        value = self._fields.get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, f"an integer from {least} to {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._fields.get(name, default)
        # Integers of JSON have any number of digits.
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.error(name, "a positive number")
        return float(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        values = self._fields.get(name)
        if not isinstance(values, list) or len(values) != count:
            raise self.error(name, f"a list of {count} positive numbers")
        return tuple(Fields({name: value}, self.where).number(name) for value in values)

    def flag(self, name: str) -> bool:
        value = self._fields.get(name, False)
        if type(value) is not bool:
            raise self.error(name, "true or false")
        return value

    def inner(self, name: str) -> "Fields":
        value = self._fields.get(name, {})
        if not isinstance(value, Mapping):
            raise self.error(name, "a JSON object")
        return Fields({k: v for k, v in value.items() if v is not None}, f"{self.where}: {name}")

    def error(self, name: str, expected: str) -> ValueError:
        if name not in self._fields:
            return ValueError(f"{self.where}: {name} is missing, expected {expected}")
        return ValueError(
            f"{self.where}: {name} is {brief(self._fields[name])}, expected {expected}"
        )
