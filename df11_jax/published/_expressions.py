r"""The regular expressions of pattern dicts, matched without backtracking.

A checkpoint brings its own expressions, and Python's matcher can take for ever on one. Those of
checkpoints are simple (`model\.layers\.\d+`), so this language is a small part of Python's, with
the same meaning. All possible matches are followed at once, as a set of positions in the text. The
set is an integer: bit i is set if the part of the expression that was read can match the first i
characters. So each piece of the expression takes a few operations on integers, for any text.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from df11_jax._brief import brief

_SUPPORTED = (
    r"characters (special ones after a backslash), '.', \d, \w, sets such as [0-9a-f], each of "
    "these perhaps with '?', '*' or '+'; '|'; groups, perhaps with '?'; '^' and '$'"
)

# The second plus of `\d++` forbids backtracking: at the end, that makes no difference.
_REPEAT = r"[?*] | \+(?:\+\Z)?"
_PIECE = re.compile(
    rf"""
      (?P<open> \((?!\?) | \(\?: )
    | (?P<bar> \| )
    | (?P<close> \) ) \??
    | (?P<anchor> [\^$] )
    | (?P<literal> \\(?![0-9A-Za-z]). | [^][\\(){{}}|?*+^$.] ) (?: {_REPEAT} )?
    | (?P<set> \. | \\[dw] | \[\^?(?: [\w.,:/ ] | -(?!-) | \\[dw] | \\(?![0-9A-Za-z]). )+\] )
      (?: {_REPEAT} )?
    """,
    re.VERBOSE | re.DOTALL,
)

# The places of each character in a text: bit i is set if it is character i.
_Places = Mapping[str, int]


class _Piece(NamedTuple):
    """A piece of an expression.

    Attributes:
        kind: the name of a group of `_PIECE`.
        text: the text of that group.
        repeat: the repetition that follows: "?", "*", "+", or nothing.
        find: a function that returns the places of the characters that match the piece.
    """

    kind: str
    text: str
    repeat: str
    find: Callable[[_Places], int]


def check(expression: str) -> None:
    """Checks that an expression is one that `fullmatch` can match.

    Raises:
        ValueError: the expression cannot be matched; the message says what is supported.
    """
    _parse(expression)


def fullmatch(expression: str, text: str) -> bool:
    """Whether an expression matches a whole text.

    Raises:
        ValueError: the expression cannot be matched; see `check`.
    """
    places: dict[str, int] = {}
    for i, character in enumerate(text):
        places[character] = places.get(character, 0) | 1 << i
    end = 1 << len(text)
    now = 1
    # The positions at which each open group begins, and at which its alternatives so far end.
    groups = [(1, 0)]
    for piece in _parse(expression):
        begin, ends = groups[-1]
        if piece.kind == "open":
            groups.append((now, 0))
        elif piece.kind == "bar":
            groups[-1] = (begin, ends | now)
            now = begin
        elif piece.kind == "close":
            groups.pop()
            now |= ends | (begin if piece.repeat else 0)
        elif piece.text == "^":
            now &= 1
        elif piece.text == "$":
            now &= end | (end >> 1 if text.endswith("\n") else 0)
        elif now:
            now = _step(now, piece.find(places), piece.repeat)
    return bool((now | groups[0][1]) & end)


def _step(before: int, matching: int, repeat: str) -> int:
    """The positions after a piece, given those before it and the characters that match it."""
    after = (before & matching) << 1
    if repeat == "?":
        return before | after
    if repeat:
        start = before if repeat == "*" else after
        # A carry runs through all characters that match, up to the first that does not.
        return start | ((start & matching) + matching ^ matching)
    return after


@functools.lru_cache(1024)
def _parse(expression: str) -> tuple[_Piece, ...]:
    pieces: list[_Piece] = []
    at = depth = 0
    while match := _PIECE.match(expression, at):
        kind = str(match.lastgroup)
        text = match[kind]
        depth += (kind == "open") - (kind == "close")
        if depth < 0:
            break
        # Only the first plus of "++" counts.
        repeat = expression[match.end(kind) : match.end()][:1]
        pieces.append(_Piece(kind, text, repeat, _finder(kind, text)))
        at = match.end()
    if at < len(expression):
        rest = expression[at:]
        raise ValueError(f"{brief(rest)} is not supported; supported are {_SUPPORTED}")
    if depth:
        raise ValueError("a parenthesis is not closed")
    return tuple(pieces)


def _finder(kind: str, text: str) -> Callable[[_Places], int]:
    if kind == "literal":
        return lambda places: places.get(text[-1], 0)
    if kind != "set":
        return lambda places: 0
    try:
        is_in_set = re.compile(text).fullmatch
    except re.error as error:
        raise ValueError(f"{brief(text)}: {error}") from None
    return lambda places: sum(where for c, where in places.items() if is_in_set(c))
