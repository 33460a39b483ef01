"""The encoder of the reference implementation of DFloat11, without the rest of its package.

pip install torch numpy tqdm
pip install --no-deps dfloat11==0.5.0 dahuffman==0.4.2
"""

import importlib.util
import pathlib
import types

import numpy as np
import torch


def load_reference() -> types.ModuleType:
    """The module with the encoder alone: its package needs a GPU's libraries."""
    package = importlib.util.find_spec("dfloat11")
    assert package and package.origin, "pip install --no-deps dfloat11"
    path = pathlib.Path(package.origin).with_name("dfloat11_utils.py")
    spec = importlib.util.spec_from_file_location("dfloat11_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.tqdm = iter
    return module


def encode(reference: types.ModuleType, tensors: list[np.ndarray]) -> dict[str, np.ndarray]:
    weights = [torch.tensor(bits.view(np.int16)).view(torch.bfloat16) for bits in tensors]
    _, counter = reference.get_codec(torch.cat(weights))
    codec, _, table = reference.get_32bit_codec(counter)
    names = ("encoded_exponent", "sign_mantissa", "output_positions", "gaps", "split_positions")
    made = dict(zip(names, reference.encode_weights(weights, codec, 8, 512), strict=True))
    return {name: array.numpy() for name, array in made.items()} | {
        "luts": tables(reference, table)
    }


def tables(reference: types.ModuleType, table: dict) -> np.ndarray | None:
    """The decoding tables of a code; None where the reference fails to make them."""
    try:
        return reference.get_luts(table).numpy()
    except UnboundLocalError:
        return None
