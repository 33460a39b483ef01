"""Makes fixtures/encoder.json with the reference implementation of DFloat11.

    pip install torch numpy tqdm
    pip install --no-deps dfloat11==0.5.0 dahuffman==0.4.2
    python tests/published/make_fixtures.py

It takes some minutes. For each of published_cases.py it has the SHA-256 of what the reference
makes of it; nothing for tables where the reference fails, which it does where the end symbol's code
is at most eight bits long and all 0. The files in `fixtures` beside it are the licences of both.
"""

import contextlib
import io
import json
import pathlib
import sys

import published_cases

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
from dfloat11_encoder import encode, load_reference, tables

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


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
