"""`df11-jax doctor`: what is looked at, and what is made of it."""

import json
import os
import platform
import sys
import warnings

import click
from rich.console import Console

import df11_jax
from df11_jax import _cuda
from df11_jax.doctor.extras import GIVES, installed_version, required
from df11_jax.doctor.findings import Finding, Report
from df11_jax.doctor.machine import describe_cuda, environment, list_backends, local_devices
from df11_jax.doctor.self_test import Outcome, check_device, encode_samples


def run_doctor(*, as_json: bool) -> bool:
    """Looks at this machine, and prints what it found.

    Args:
        as_json: print JSON, not tables.

    Returns:
        Whether all that should work works.
    """
    # Whoever has the GPU keeps its memory; JAX would take most of what is left.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    report = examine()
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        # What is not a terminal has no width to keep to.
        report.print(Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    return not report.problems


def examine() -> Report:
    """Looks at this machine: versions, backends, decoders, optional packages."""
    needed = required()
    versions = {"df11_jax": df11_jax.__version__, "python": platform.python_version()}
    report = Report(
        versions | {"jaxlib": installed_version("jaxlib")} | {p.name: p.installed for p in needed},
        f"{platform.system()} {platform.machine()}",
        environment(),
        describe_cuda(),
        extras={extra: packages for extra in GIVES if (packages := required(extra))},
    )
    for package in needed:
        if not package.will_do:
            report.problems.append(
                Finding(
                    f"df11_jax needs {package.name} {package.oldest} or newer, and "
                    f"{package.installed or 'none'} is installed",
                    f'pip install "{package.name}>={package.oldest}"',
                )
            )
    _examine_backends(report)
    _examine_driver(report)
    return report


def _examine_backends(report: Report) -> None:
    try:
        report.backends = list_backends()
    except RuntimeError as error:
        report.problems.append(
            Finding(
                f"JAX does not start: {str(error).strip()}",
                "Unset JAX_PLATFORMS, or set it to backends that are there",
            )
        )
        return
    for backend in report.backends:
        if backend.obstacle is not None:
            what = f"{backend.platform} decodes by {backend.decoder}, for {backend.why}"
            report.problems.append(Finding(what, backend.obstacle.remedy))
    samples, outcomes = encode_samples()
    report.self_tests += outcomes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it names this command
        for backend in report.backends:
            for device in local_devices(backend.platform):
                report.self_tests += check_device(device, backend.platform, samples)
    report.problems += map(_failure, filter(_has_failed, report.self_tests))


def _has_failed(test: Outcome) -> bool:
    return test.error is not None


def _failure(test: Outcome) -> Finding:
    return Finding(
        f"{test.decoder} on {test.device}, {test.layout} layout: {test.error}",
        "Do not use this decoder. If df11_jax, jax and the driver are as they were installed, "
        "please report this",
    )


def _examine_driver(report: Report) -> None:
    has_gpu = any(backend.platform == "cuda" for backend in report.backends)
    driver = _cuda.driver_version()
    if driver is None or has_gpu:
        return
    what = f"There is an NVIDIA driver for CUDA {_cuda.version_name(driver)}, but JAX has no GPU"
    if "JAX_PLATFORMS" in report.environment:
        remedy = "If that is not on purpose, unset JAX_PLATFORMS"
    elif report.cuda.jax_plugins:
        remedy = "What JAX wrote to the standard error says why it does not use the driver"
    else:
        remedy = f'If that is not on purpose: pip install "jax[cuda{driver[0]}]"'
    report.notes.append(Finding(what, remedy))
