#!/usr/bin/env python3
"""Runs each example in examples/programs with the program that it is about.

    python3.12 tools/programs.py [--environments DIRECTORY] [NAME ...]

Each example says at its top, as inline script metadata, what it needs. An environment is made for
it by venv and pip: this checkout of df11_jax, whose wheel is built once and without CUDA, and the
program in the version given there. All of them take some 15 GB. They are temporary, or stay in the
directory that is given, and are brought up to date there. NAME is that of an example, such as
with_qwix; without one, all are run. What could not be run is said, and makes the status 1, too.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import tomllib
import venv

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "programs"
BEGIN, END = "# /// script", "# ///"
LAST_LINES = 12  # of what a command has written that failed


def main():
    """Runs the examples, and says what became of each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--environments", type=pathlib.Path, metavar="DIRECTORY")
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    known = sorted(path.stem for path in EXAMPLES.glob("with_*.py"))
    names = arguments.names or known
    if unknown := set(names) - set(known):
        parser.error(f"no such example: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if sys.version_info < (3, 12):
        parser.error("the programs need Python 3.12 or newer; run this with it")
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        temporary = pathlib.Path(temporary)
        wheel = build_wheel(temporary / "wheel")
        for name in names:
            print(f"== {name}", flush=True)
            environment = (arguments.environments or temporary).resolve() / name
            results[name] = run(EXAMPLES / f"{name}.py", environment, wheel)
            print(results[name], flush=True)
    print("== summary")
    for name, result in results.items():
        print(f"{name}: {result}")
    return int(any(result != "passed" for result in results.values()))


def build_wheel(directory):
    """The wheel of this checkout."""
    options = ("--no-deps", "-C", "cmake.define.DF11_CUDA=OFF", "--wheel-dir", directory)
    call(sys.executable, "-m", "pip", "wheel", *options, ROOT).check_returncode()
    (wheel,) = directory.glob("*.whl")
    return wheel


def run(example, environment, wheel):
    """Runs an example in its environment; returns what became of it."""
    metadata = read_metadata(example)
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    requirements = [
        f"{requirement} @ {wheel.as_uri()}" if requirement.startswith("df11_jax") else requirement
        for requirement in metadata["dependencies"]
    ]
    alone = metadata.get("tool", {}).get("programs", {}).get("without-dependencies", [])
    # A wheel of the same version does not take the place of an older one without being told to.
    replaced = ["--force-reinstall", "--no-deps", wheel, *alone]
    for options in (["--upgrade", "pip"], requirements, replaced):
        if call(python, "-m", "pip", "install", "--disable-pip-version-check", *options).returncode:
            return "NOT RUN: its environment could not be made, for the reason above"
    finished = call(python, example, cwd=environment)
    if not finished.returncode:
        print(finished.stdout, end="")
    return "FAILED, with the lines above" if finished.returncode else "passed"


def read_metadata(example):
    """What an example says of its requirements; https://peps.python.org/pep-0723."""
    lines = example.read_text().splitlines()
    begin = lines.index(BEGIN) + 1
    block = lines[begin : lines.index(END, begin)]
    return tomllib.loads("\n".join(line[2:] for line in block))


def call(*command, cwd=None):
    """Runs a command; what it wrote last is shown if it fails."""
    command = list(map(str, command))
    finished = subprocess.run(command, cwd=cwd, text=True, capture_output=True, check=False)
    if finished.returncode:
        print("$", *command)
        written = (finished.stdout + finished.stderr).splitlines()
        print(*written[-LAST_LINES:], sep="\n")
    return finished


if __name__ == "__main__":
    sys.exit(main())
