"""Values in messages, which show no more of them than a reader wants."""

import reprlib
from collections.abc import Sequence
from typing import Any

_MOST = 80
_MOST_NAMES = 8

_repr = reprlib.Repr()
_repr.maxlevel = 3
_repr.maxdict = _repr.maxlist = _repr.maxtuple = _repr.maxset = 8
_repr.maxstring = _repr.maxlong = _repr.maxother = _MOST


def brief(value: Any) -> str:
    """The beginning of a value's `repr`, made without making all of it.

    `f"{brief(value)}"` first writes out the whole value, which may be of any size where files are
    not trusted.
    """
    text = _repr.repr(value)
    return text if len(text) <= _MOST else text[: _MOST - 3] + "..."


def listed(names: Sequence[str]) -> str:
    """The first names of many, with the number of the others."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
