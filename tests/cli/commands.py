"""Commands that tests run: in the process of the test, and as processes, which may die."""

import subprocess
import sys

from click.testing import CliRunner

from df11_jax.cli import _commands


def run(*args, status=0):
    result = CliRunner().invoke(_commands.commands, [str(arg) for arg in args])
    assert result.exit_code == status, result.output
    return result.output


def process(program, *args, **options):
    """A real `df11-jax`, after the given statements."""
    code = f"""
import os, signal, resource
{program}
from df11_jax.cli import main
main()
"""
    command = [sys.executable, "-P", "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def die(function, signal_name):
    """Statements that make the fourth call of a function end the process by a signal."""
    module, _, name = function.rpartition(".")
    return f"""
import {module} as module
original, calls = module.{name}, []
def dying(*args, **kwargs):
    calls.append(0)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.{signal_name})
    return original(*args, **kwargs)
module.{name} = dying
"""
