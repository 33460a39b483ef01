"""Numbers of bytes, written and read."""

import math
import re

_UNITS = {"": 1, "B": 1}
for _i, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}B": 1000**_i, _letter: 1024**_i, f"{_letter}IB": 1024**_i}


def format_bytes(n: float) -> str:
    """A number of bytes, written for people."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def parse_bytes(text: str) -> int:
    """The number of bytes in a text such as `24GB`, `24GiB` or `80G`.

    Raises:
        ValueError: the text is not a number of bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Z]*)\s*", text.upper())
    nbytes = float(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else 0.0
    if not 1 <= nbytes < math.inf:
        raise ValueError(f"{text!r} is no memory size: expected one such as 24GB, 24GiB or 80G")
    return int(nbytes)
