"""The workflows run scripts that there are, and a release is of the wheels that are built."""

import os
import re
import subprocess
import tomllib

import pytest
from compiling import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = sorted((ROOT / ".ci").glob("*"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_steps_are_scripts(path):
    # What only a workflow does cannot be tried without one.
    readme = (ROOT / "README.md").read_text()
    for command in re.findall(r"^ *- run: (.*)$", path.read_text(), re.MULTILINE):
        program, script, *_ = command.split()
        if program != "git" and f"\n    {command}\n" not in readme:
            assert program == "bash" and ROOT / script in SCRIPTS, f"{path.name}: {command}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_documented(path):
    assert f"`.ci/{path.name}`" in (ROOT / "docs" / "releasing.md").read_text()


@pytest.fixture
def release(tmp_path):
    """Runs a copy of .ci/release on files of a folder, but for the tools that it gets by pip."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = project["version"]
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "release").write_text((ROOT / ".ci" / "release").read_text())
    (tmp_path / "CHANGELOG.md").write_text(f"## [{version}] - 2026-01-01\n")
    (tmp_path / "dist" / "wheels").mkdir(parents=True)
    # What needs a network does nothing here.
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python3", "twine"):
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)

    def run(names, tag=f"v{version}"):
        for name in names:
            (tmp_path / "dist" / "wheels" / name).touch()
        return subprocess.run(
            ["bash", tmp_path / ".ci" / "release", tag],
            env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )

    return run, version


def files(version):
    platforms = ("manylinux_2_28_x86_64", "manylinux_2_28_aarch64", "macosx_11_0_arm64")
    wheels = (f"{tag}-{p}.whl" for tag in ("cp311-cp311", "cp312-abi3") for p in platforms)
    return [f"df11_jax-{version}.tar.gz", *(f"df11_jax-{version}-{wheel}" for wheel in wheels)]


def test_release_is_complete(release):
    run, version = release
    result = run(files(version))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("change", ["missing", "another", "version", "changelog"])
def test_release_is_refused(release, change):
    run, version = release
    names, tag = files(version), f"v{version}"
    named = names[-1]
    if change == "missing":
        names.pop()
    elif change == "another":
        named = f"df11_jax-{version}-cp312-abi3-linux_x86_64.whl"
        names.append(named)
    elif change == "version":
        tag = "v99.0"
    else:
        names, tag = files("99.0"), "v99.0"
        named = "CHANGELOG.md has no section [99.0]."
    result = run(names, tag)
    assert result.returncode != 0
    assert named in result.stdout
