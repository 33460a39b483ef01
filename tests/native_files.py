"""Native files that the library does not write: of damaged leaves."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.flax import save_file

from df11_jax import DF11Array
from df11_jax.checkpoints._native_format import METADATA, part_names


def corrupt(array: DF11Array, word: int = 0) -> DF11Array:
    """A compressed leaf with a wrong bit in the exponents of its last slice."""
    exponents = np.array(array.exponents)
    exponents.reshape(-1, exponents.shape[-1])[-1, word] ^= 0x10
    payload = [exponents if part is array.exponents else part for part in array.payload]
    return DF11Array.from_payload(payload, array.layout)


def save_unchecked(leaves: Mapping[str, DF11Array], path: Path) -> None:
    """Saves compressed leaves as they are, in a file without checksums of tensors."""
    tensors = {
        name: jnp.asarray(part)
        for leaf, array in leaves.items()
        for name, part in zip(part_names(leaf), array.payload, strict=True)
    }
    save_file(tensors, path, metadata=METADATA)
