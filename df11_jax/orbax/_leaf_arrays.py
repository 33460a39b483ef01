"""The arrays of a leaf: in memory, as Orbax stores them, and as checksums cover them."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from df11_jax import _layout
from df11_jax._array import DF11Array
from df11_jax.orbax._manifest import TABLES, StoredLeaf, table_words


def join(arrays: Iterable[Any], leaf: StoredLeaf) -> DF11Array:
    """Makes a compressed leaf of its arrays, or of what stands for them.

    Args:
        arrays: the five arrays, in the order of the payload.
        leaf: the description of the leaf.
    """
    assert leaf.layout is not None, "the leaf is compressed"
    return DF11Array.from_payload(arrays, leaf.layout)


def to_stored(array: DF11Array) -> dict[str, Any]:
    """The arrays that are stored for a compressed leaf."""
    header, codebook, chunk_offsets, exponents, sign_mantissa = array.payload
    short = (header, codebook, chunk_offsets)
    if all(_is_on_this_host(part) for part in short):
        tables: Any = np.concatenate(short, axis=-1)
    else:
        tables = jnp.concatenate(short, axis=-1)
    return {TABLES: tables, "exponents": exponents, "sign_mantissa": sign_mantissa}


def from_stored(arrays: Sequence[Any], leaf: StoredLeaf) -> DF11Array:
    """Makes a compressed leaf of the arrays that are stored for it.

    Args:
        arrays: the arrays that were read.
        leaf: the description of the leaf.
    """
    if not leaf.has_tables:
        return join(arrays, leaf)
    assert leaf.layout is not None, "the leaf is compressed"
    tables, exponents, sign_mantissa = arrays
    words = table_words(leaf.layout)
    ends = list(itertools.accumulate(words, initial=0))
    short = [tables[..., start:end] for start, end in itertools.pairwise(ends)]
    return join([*short, exponents, sign_mantissa], leaf)


def checked_arrays(value: Any, dtype: str | None) -> tuple[Any, ...]:
    """The arrays that the checksum of a leaf covers.

    Args:
        value: the leaf.
        dtype: the dtype with which the leaf was saved, since Python's numbers have none of their
            own; None if it is a text, which has no checksum.
    """
    if dtype is None:
        return ()
    if isinstance(value, DF11Array):
        return value.payload
    if not isinstance(value, (jax.Array, np.ndarray)):
        return (np.asarray(value, dtype),)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return (jax.random.key_data(value),)
    return (value,)


def check_header(array: DF11Array, name: str) -> None:
    """Checks that those rows of the header which this process has agree with the static layout.

    Args:
        array: a compressed leaf.
        name: the name of the leaf, for messages.

    Raises:
        ValueError: the header disagrees; the message names the leaf.
    """
    expected, known = _layout.pack_header(array.layout), _layout.CODEBOOK_ID
    for rows in _local_rows(array.header):
        for row in rows[(rows[:, :known] != expected[:known]).any(axis=-1)][:1]:
            try:
                found = _layout.unpack_header(row)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if found.shape == array.slice_shape:
                raise ValueError(f"{name}: its header says {found}, expected {array.layout}")
            raise ValueError(
                f"{name}: its header says that slices have the shape {list(found.shape)}, expected "
                f"{list(array.slice_shape)}"
            )


def _is_on_this_host(array: Any) -> bool:
    return (
        not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated
    )


def _local_rows(header: Any) -> list[np.ndarray]:
    """The rows of the header that are complete in this process."""
    if isinstance(header, jax.Array):
        parts = [np.asarray(shard.data) for shard in header.addressable_shards]
    else:
        parts = [np.asarray(header)]
    words = _layout.HEADER_WORDS
    return [part.reshape(-1, words) for part in parts if part.shape[-1] == words]
