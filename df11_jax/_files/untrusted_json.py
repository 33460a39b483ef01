"""JSON from untrusted files."""

import json
from typing import Any

from df11_jax._brief import brief

MAX_BYTES = 100_000_000  # of a text; the library safetensors has this limit for headers


def parse_json(text: bytes, *, unique: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: the text of one value.
        unique: refuse objects that have a name twice. (Configurations edited by hand do.)

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has strings that are not
            Unicode, which could be neither printed nor names of files.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_names if unique else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # Halves of characters pass the parser, escaped or as three bytes, of which this is the first.
    if b"\\ud" in text.lower() or b"\xed" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{brief(name)} is there twice")
        fields[name] = value
    return fields
