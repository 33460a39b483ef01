"""Settings that XLA reads once, before anything imports jax, and those of other processes."""

import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import tempfile

import pytest
from packaging.version import Version

_FLAGS = (
    # Otherwise the CPU scheduler runs independent decodes at once, and memory tests mean nothing.
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "--xla_force_host_platform_device_count=4",
)
# On a CPU most programs run once, and are small: to optimize them takes longer than it saves, and
# XLA's newer code generator takes twice as long as the older one, where there still is that one
# (XLA ends a process that sets a flag it does not know). The compiler for GPUs, which JAX's plugins
# bring, makes what users run; so do examples, notebooks and the demo on a CPU.
if importlib.util.find_spec("jax_plugins") is None:
    _FLAGS += ("--xla_backend_optimization_level=0",)
    _has_older_generator = Version(importlib.metadata.version("jaxlib")) < Version("0.11.1")
else:
    _has_older_generator = False

# What tests, their processes and both of pytest's compile alike is compiled once. The folder is
# this run's, which removes it; processes get it from the one that begins.
_programs = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="df11_jax_programs_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def _package_folder() -> pathlib.Path:
    """Where the package that is tested is, installed or in the tree."""
    spec = importlib.util.find_spec("df11_jax")
    if spec is None or spec.origin is None:
        raise pytest.UsageError("df11_jax is not installed: pip install .")
    folder = pathlib.Path(spec.origin).parent
    try:
        is_compiled = importlib.util.find_spec("df11_jax._cpu_library") is not None
    except importlib.metadata.PackageNotFoundError:
        is_compiled = False
    if not is_compiled:
        raise pytest.UsageError(
            f"{folder} has no compiled library. `python -m pytest` takes this source tree for "
            "df11_jax, in front of what is installed. Either run `pytest`, after `pip install .`, "
            "or compile the library for the tree: pip install -e ."
        )
    return folder


def pytest_configure(config: pytest.Config) -> None:
    flags = _FLAGS
    if _has_older_generator and config.option.markexpr != "fusion_emitters":
        flags += ("--xla_cpu_use_fusion_emitters=false",)
    # Of the same flag, the last counts.
    os.environ["XLA_FLAGS"] = " ".join((*flags, os.environ.get("XLA_FLAGS", ""))).strip()
    # Tests that start `python -P -c` get the package that is tested here.
    folders = (str(_package_folder().parent), os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest tests come first: if they were the last ones, a process would run them alone.
    items.sort(key=lambda item: "xla_ffi" not in item.path.parts)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("fusion_emitters"):
        name = "--xla_cpu_use_fusion_emitters="
        set_to = [f for f in os.environ["XLA_FLAGS"].split() if f.startswith(name)]
        if set_to and set_to[-1] == f"{name}false":
            pytest.skip("needs XLA's newer code generator: pytest -m fusion_emitters tests/models")


def pytest_unconfigure() -> None:
    if _programs is not None:
        shutil.rmtree(_programs, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Drops what jax has compiled before it is too much.

    Each program is in several mappings of memory, of which Linux gives a process 65,530 by default:
    where there is none left, XLA ends the process.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 10_000:
        import jax

        jax.clear_caches()
