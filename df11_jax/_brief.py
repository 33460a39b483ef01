"""Values and text in messages, which show no more of them than a reader wants."""

import re
import reprlib
from collections.abc import Sequence
from typing import Any

_MOST = 80
_MOST_NAMES = 8

_repr = reprlib.Repr()
_repr.maxlevel = 3
_repr.maxdict = _repr.maxlist = _repr.maxtuple = _repr.maxset = 8
_repr.maxstring = _repr.maxlong = _repr.maxother = _MOST

# What moves the cursor, hides or reorders text, or cannot be encoded: control characters, other
# ends of lines, changes of direction, and halves of characters.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def brief(value: Any) -> str:
    """The beginning of a value's `repr`, made without making all of it.

    `f"{value!r:.80}"` first writes out the whole value, which may be of any size where files are
    not trusted.
    """
    text = _repr.repr(value)
    return text if len(text) <= _MOST else text[: _MOST - 3] + "..."


def listed(names: Sequence[str]) -> str:
    """The first names of many, with the number of the others; "nothing" if there are none."""
    more = len(names) - _MOST_NAMES
    first = ", ".join(names[:_MOST_NAMES]) or "nothing"
    return first + (f" and {more:,} more" if more > 0 else "")


def printable(text: str, *, keep: str = "") -> str:
    r"""A text without what a terminal would obey rather than show.

    Names, paths and strings of files that are not trusted may have control characters.

    Args:
        text: any text.
        keep: characters that stay as they are, such as `"\n"`.

    Returns:
        The text, with escapes as in Python's strings in place of those characters.
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        return character if character in keep else character.encode("unicode_escape").decode()

    return _UNPRINTABLE.sub(escape, text)
