"""`df11-jax doctor`, on what is here, and on copies of the package that are damaged."""

import glob
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import tomllib

import jax
import pytest
from click.testing import CliRunner
from compiling import ROOT, needs_compiler
from packaging.requirements import Requirement

import df11_jax
from df11_jax import _cpu_library, _cuda
from df11_jax.cli import _commands
from df11_jax.doctor import extras
from df11_jax.doctor.examine import examine
from df11_jax.doctor.self_test import PLAIN, check_product, simd_name

_PACKAGE = pathlib.Path(df11_jax.__file__).parent


@pytest.fixture(scope="module")
def report():
    return examine()


def test_everything_works_here(report):
    assert report.problems == []
    tests = [test for test in report.self_tests if test.platform in ("host", "cpu")]
    assert all(test.error is None for test in tests)
    levels = map(simd_name, _cpu_library.simd_levels())
    assert {(test.decoder, test.layout) for test in tests} == {
        (decoder, layout)
        for decoder in ("encoder", PLAIN, *levels)
        for layout in ("native", "published")
    }
    assert min(test.weights for test in tests) > 65536


def test_products_pick_weights():
    # On CPUs, they are decompressed first.
    outcome = check_product(jax.devices("cpu")[0], "cpu")
    assert outcome.error is None
    assert outcome.weights > 65536


def test_what_users_do_not_let_jax_do():
    strict = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    with strict[0], strict[1], jax.debug_nans(True), jax.debug_infs(True):
        assert examine().problems == []


def test_backends(report):
    by_platform = {backend.platform: backend for backend in report.backends}
    assert by_platform["cpu"].decoder == f"compiled, {simd_name(_cpu_library.simd_levels()[-1])}"
    has_avx = platform.machine() in ("x86_64", "AMD64")  # or could have it
    assert ("AVX" in by_platform["cpu"].why) == has_avx
    assert len(by_platform["cpu"].devices) == len(jax.local_devices(backend="cpu"))
    assert [b.is_default for b in report.backends].count(True) == 1


def test_json(report):
    found = json.loads(json.dumps(report.as_json()))
    assert found["ok"] is True
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["df11_jax"] == df11_jax.__version__
    assert found["cuda"]["in_build"] == _cuda.is_in_build()
    assert {"platform", "decoder", "layout", "weights", "error"} < set(found["self_tests"][0])
    assert found["extras"]["plot"]["gives"] == "plots of reports"
    assert found["extras"]["plot"]["will_do"] is True


def test_text(report, monkeypatch):
    monkeypatch.setattr("df11_jax.doctor.examine.examine", lambda: report)
    result = CliRunner().invoke(_commands.commands, ["doctor"])
    assert result.exit_code == 0
    text = result.stdout
    assert "compiled, " in text and "same bits, " in text and "driver here" in text
    assert text.rstrip().endswith("All that should work here works.")


def test_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.GIVES) <= set(project["optional-dependencies"])


def test_extras_that_need_one_another_and_extras_of_others(tmp_path, monkeypatch):
    metadata = tmp_path / "df11_jax-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(
        "Metadata-Version: 2.1\nName: df11_jax\nVersion: 9.9\nRequires-Dist: numpy\n"
        'Requires-Dist: jax[cuda12]>=0.9.2; extra == "cuda12"\n'
        'Requires-Dist: DF11-JAX[cuda12, two]; extra == "one"\n'
        'Requires-Dist: df11.jax[one]; extra == "two"\nRequires-Dist: click; extra == "two"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = {
        extra: [package.name for package in extras.required(extra)]
        for extra in (None, "cuda12", "one", "two", "three")
    }
    both = ["click", "jax"]
    assert names == {None: ["numpy"], "cuda12": ["jax"], "one": both, "two": both, "three": []}
    (jax_package,) = extras.required("cuda12")
    assert jax_package.will_do and jax_package.installed == jax.__version__


@pytest.mark.parametrize(
    ("requirement", "installed", "shown", "will_do"),
    [
        ("name", None, "name", False),
        ("name", "0.1", "name 0.1", True),
        ("name>=0.9.2", "0.10.0", "name 0.10.0", True),
        ("name>=0.9.2", "0.9.2+local", "name 0.9.2+local", True),
        ("name>=0.9.2", "0.9.1", "name 0.9.1 (needs >=0.9.2)", False),
        ("name>=2", "2.0.1rc1", "name 2.0.1rc1", True),
    ],
)
def test_versions(requirement, installed, shown, will_do):
    package = extras.Package(Requirement(requirement), installed)
    assert (str(package), package.will_do) == (shown, will_do)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, without the CUDA library."""
    shutil.copytree(
        _PACKAGE,
        tmp_path / "df11_jax",
        ignore=shutil.ignore_patterns("__pycache__", "_cuda_library.*so", "demo"),
    )
    return tmp_path


def doctor(folder, status, **environment):
    """What a real `df11-jax doctor --json` prints, with the package in `folder`."""
    code = "from df11_jax.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, "doctor", "--json"],
        env=os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == status, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["ok"] == (status == 0)
    return found


def test_without_the_compiled_library(copy):
    (library,) = (copy / "df11_jax").glob("_cpu_library.*so")
    library.unlink()
    found = doctor(copy, 1)
    (cpu,) = found["backends"]
    assert cpu["decoder"] == "plain XLA operations"
    assert found["problems"][0]["what"].startswith("cpu decodes by plain XLA operations")
    assert "pip install ." in found["problems"][0]["remedy"]
    assert any("has no compiled library" in problem["what"] for problem in found["problems"])


@needs_compiler
def test_cuda_library_that_does_not_load_and_a_driver_without_a_gpu(copy):
    # Neither is an error where JAX sees no GPU.
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (copy / "df11_jax" / f"_cuda_library{suffix}").write_bytes(b"no library")
    source, driver = copy / "cuda.cc", copy / "libcuda.so.1"
    source.write_text(
        'extern "C" int cuDriverGetVersion(int* version) { *version = 12040; return 0; }'
    )
    subprocess.run(["g++", "-shared", "-fPIC", "-o", driver, source], check=True)
    found = doctor(copy, 0, LD_LIBRARY_PATH=str(copy))
    assert found["cuda"]["in_build"] is True and found["cuda"]["loads"] is False
    assert "does not load" in found["cuda"]["error"]
    assert "_cuda_library" in found["cuda"]["error"]
    assert found["cuda"]["driver_cuda"] == "12.4"
    assert not found["problems"]
    (note,) = found["notes"]
    assert note["what"] == "There is an NVIDIA driver for CUDA 12.4, but JAX has no GPU"
    assert "unset JAX_PLATFORMS" in note["remedy"]


def test_a_decoder_that_is_wrong(copy):
    with (copy / "df11_jax" / "_xla_decoder.py").open("a") as file:
        file.write("\n_right = decode\n\ndef decode(*args, **shape):\n")
        file.write("    return -_right(*args, **shape)\n")
    found = doctor(copy, 1)
    (problem,) = found["problems"]
    assert problem["what"].startswith("plain XLA on cpu, native layout: 262,654 of 262,654 weights")
    (failed,) = (test for test in found["self_tests"] if test["error"])
    assert (failed["decoder"], failed["layout"]) == (PLAIN, "native")


def test_a_package_that_is_too_old_and_a_backend_that_is_not_there(copy):
    metadata = copy / "df11_jax-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(
        "Metadata-Version: 2.1\nName: df11_jax\nVersion: 9.9\n"
        "Requires-Dist: numpy>=999\nRequires-Dist: jax>=0.9.2\n"
        'Requires-Dist: df11_jax[cli]; extra == "demo"\nRequires-Dist: nowhere; extra == "demo"\n'
        'Requires-Dist: click>=8.1; extra == "cli"\n'
    )
    found = doctor(copy, 1, JAX_PLATFORMS="nonsense")
    too_old, no_backend = found["problems"]
    assert too_old["what"].startswith("df11_jax needs numpy>=999, and ")
    assert too_old["remedy"] == 'pip install "numpy>=999"'
    assert no_backend["what"].startswith("JAX does not start: Unable to initialize backend 'nonse")
    assert found["backends"] == found["self_tests"] == []
    assert found["extras"]["demo"]["packages"]["nowhere"] is None
    assert found["extras"]["demo"]["packages"]["click"]
    assert found["extras"]["demo"]["will_do"] is False


@pytest.mark.skipif(bool(glob.glob("/dev/nvidia*")), reason="needs a machine without NVIDIA's GPUs")
@pytest.mark.parametrize("command", ["doctor", "bench", "compare"])
def test_a_gpu_that_jax_does_not_see(command):
    # As in a container that was started without its GPUs: JAX 0.10 ends with an
    # AssertionError that has no text.
    result = subprocess.run(
        [sys.executable, "-P", "-c", "from df11_jax.cli import main; main()", command, "--json"],
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = result.stdout + result.stderr
    assert result.returncode == (1 if command == "doctor" else 2)
    assert "cuda" in output and "Traceback" not in output and "a bug" not in output


def test_import_starts_nothing():
    code = "import df11_jax, sys; from jax._src import xla_bridge; assert not xla_bridge._backends"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_help():
    result = CliRunner().invoke(_commands.commands, ["doctor", "--help"])
    assert result.exit_code == 0 and "--json" in result.output
