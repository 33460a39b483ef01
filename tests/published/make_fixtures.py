"""Makes fixtures/encoder.json with the reference implementation of DFloat11.

    pip install torch numpy tqdm
    pip install --no-deps dfloat11==0.5.0 dahuffman==0.4.2
    python tests/published/make_fixtures.py

It takes some minutes. For each of published_cases.py it has the SHA-256 of what the reference
makes of it; nothing for tables where the reference fails, which it does where the end symbol's code
is at most eight bits long and all 0. The files in `fixtures` beside it are the licences of both.
"""

import contextlib
import importlib.util
import io
import json
import pathlib
import sys
import types

import numpy as np
import published_cases
import torch

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


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
    try:
        return reference.get_luts(table).numpy()
    except UnboundLocalError:
        return None


def main() -> None:
    reference = load_reference()
    fixtures = {"units": {}, "codes": {}}
    for name, tensors in published_cases.cases().items():
        print(name, file=sys.stderr)
        with contextlib.redirect_stdout(io.StringIO()):
            made = encode(reference, tensors)
        fixtures["units"][name] = {
            field: published_cases.digest(array) for field, array in sorted(made.items())
        }
    for name, counter in published_cases.counts().items():
        counter = dict(sorted(counter.items()))
        with contextlib.redirect_stdout(io.StringIO()):
            _, _, table = reference.get_32bit_codec(counter)
            fixtures["codes"][name] = published_cases.digest(tables(reference, table))
    path = FIXTURES / "encoder.json"
    path.write_text(json.dumps(fixtures, indent=1) + "\n")


if __name__ == "__main__":
    main()
