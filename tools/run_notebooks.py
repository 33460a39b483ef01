"""Runs notebooks from top to bottom, and saves them with what they print and plot.

    pip install ".[test]" && python tools/run_notebooks.py

runs those in notebooks/; paths of others can follow. Only what the next run would give again is
saved: no times, and nothing of the interpreter that ran them.
"""

import pathlib
import sys
import tempfile
from collections.abc import Sequence

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parents[1]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
TIMEOUT = 600  # seconds, for a cell that hangs


class RunningInterpreter(KernelSpecManager):
    """Starts this Python, whatever kernels the machine has installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The same for every name."""
        # Without -X, debugpy warns that it cannot set breakpoints in frozen modules.
        command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher"]
        return KernelSpec(argv=[*command, "-f", "{connection_file}"], **METADATA["kernelspec"])


def run(path: pathlib.Path, folder: pathlib.Path) -> nbformat.NotebookNode:
    """Runs a notebook in a kernel of its own.

    Args:
        path: the path of the notebook, which is only read.
        folder: the folder that it runs in.

    Returns:
        The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_spec_manager=RunningInterpreter()),
        resources={"metadata": {"path": str(folder)}},
        timeout=TIMEOUT,
        record_timing=False,
        coalesce_streams=True,
    ).execute(cleanup_kc=True)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
    return notebook


def main(paths: Sequence[str]) -> None:
    """Runs and saves the notebooks at `paths`, or all in notebooks/."""
    for path in map(pathlib.Path, paths or sorted((ROOT / "notebooks").glob("*.ipynb"))):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(run(path, pathlib.Path(folder)), path)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
