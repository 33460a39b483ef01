"""The command `df11-jax doctor`."""

import os
import sys
from typing import TYPE_CHECKING

import click
from rich.table import Table

from df11_jax.cli._errors import DIFFERENT
from df11_jax.cli._options import examples, json_option
from df11_jax.cli._output import make_table, open_console, print_json

if TYPE_CHECKING:  # it takes long to import
    from df11_jax.doctor.findings import Diagnosis
    from df11_jax.doctor.machine import Backend, Cuda
    from df11_jax.doctor.self_test import Outcome


@click.command(
    short_help="What this machine can do, and what is missing.",
    epilog=examples("doctor", "doctor --json"),
)
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine can do, and what to do about what it cannot.

    Versions, the devices of every backend of JAX, which decoder is used on each and why, whether
    the CUDA library is there and loads, optional packages, and a self-test of every decoder: all
    65,536 bit patterns, and weights from a normal distribution. A missing GPU is no error.
    """
    # Whoever has the GPU keeps its memory; JAX would take most of what is left.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from df11_jax.doctor.examine import examine

    diagnosis = examine()
    if as_json:
        print_json(diagnosis.as_json())
    else:
        _print(diagnosis)
    if diagnosis.problems:
        sys.exit(DIFFERENT)


def _print(diagnosis: "Diagnosis") -> None:
    console = open_console()
    versions = (f"{name} {version or 'missing'}" for name, version in diagnosis.versions.items())
    console.print(", ".join(versions))
    console.print(f"on {diagnosis.system}")
    for name, value in diagnosis.environment.items():
        console.print(f"{name}={value}")
    console.print(_backend_table(diagnosis.backends))
    console.print(_cuda_table(diagnosis.cuda))
    console.print(_self_test_table(diagnosis.self_tests))
    console.print(_extra_table(diagnosis))
    for title, findings in (("To know", diagnosis.notes), ("Does not work", diagnosis.problems)):
        for finding in findings:
            console.print()
            console.print(f"{title}: {finding.what}", soft_wrap=True)
            console.print(f"  What to do: {finding.remedy}", soft_wrap=True)
    if not diagnosis.problems:
        console.print()
        console.print("All that should work here works.")


def _backend_table(backends: "list[Backend]") -> Table:
    table = make_table("backend", "devices", "decoder", "because", title="Backends of JAX")
    for backend in backends:
        kinds = (
            f"{backend.devices.count(kind)} x {kind}" for kind in dict.fromkeys(backend.devices)
        )
        default = " (default)" if backend.is_default else ""
        table.add_row(backend.platform + default, ", ".join(kinds), backend.decoder, backend.why)
    return table


def _cuda_table(cuda: "Cuda") -> Table:
    table = make_table("", "", title="CUDA")
    table.add_row("library in this build", "yes" if cuda.in_build else "no")
    if cuda.in_build:
        table.add_row("loads", "yes" if cuda.loads else f"no: {cuda.error}")
    if cuda.loads:
        capabilities = ", ".join(cuda.compute_capabilities)
        table.add_row("built for", f"CUDA {cuda.built_for}, compute capability {capabilities}")
        table.add_row("needs", cuda.needs)
    driver = "none"
    if cuda.driver_cuda:
        driver = f"{cuda.driver or 'unknown'}, for CUDA {cuda.driver_cuda}"
    table.add_row("driver here", driver)
    plugins = (f"{name} {version}" for name, version in cuda.jax_plugins.items())
    table.add_row("packages of JAX for it", ", ".join(plugins) or "none")
    return table


def _self_test_table(tests: "list[Outcome]") -> Table:
    columns = ("device", "decoder", "layout", "weights", "")
    table = make_table(*columns, title="Self-test, bit by bit")
    for test in tests:
        device = test.platform if test.platform == test.device else test.device
        verdict = test.error or f"same bits, {test.seconds:.1f} s"
        table.add_row(device, test.decoder, test.layout, f"{test.weights:,}", verdict)
    return table


def _extra_table(diagnosis: "Diagnosis") -> Table:
    from df11_jax.doctor.extras import GIVES

    table = make_table("for", "installed", "missing", "to install", title="Optional")
    for extra, packages in diagnosis.extras.items():
        there = [package for package in packages if package.will_do]
        missing = [package for package in packages if not package.will_do]
        table.add_row(
            GIVES[extra],
            ", ".join(map(str, there)),
            ", ".join(map(str, missing)),
            f'pip install "df11_jax[{extra}]"' if missing else "",
        )
    return table
