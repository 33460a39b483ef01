"""Python in processes of its own, also in several that know each other."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

TESTS = pathlib.Path(__file__).resolve().parent


def start_python(
    program: str, *arguments: Any, devices: int = 1, **options: Any
) -> "subprocess.Popen[str]":
    """Runs a program that finds the same df11_jax, and the modules of the tests."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    folders = (TESTS, TESTS / "models", TESTS / "orbax", os.environ["PYTHONPATH"])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "XLA_FLAGS": flags,  # conftest.py's; of the same one, the last counts
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(processes: Sequence["subprocess.Popen[str]"], timeout: float = 600) -> list[str]:
    """What the processes print; all of them are to succeed."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in outputs]


def run_python(program: str, *arguments: Any, devices: int = 1) -> str:
    return finish([start_python(program, *arguments, devices=devices)])[0]


def find_port() -> int:
    """A port that is free, for the coordinator of several processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])
