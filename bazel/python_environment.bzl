"""What a build takes from the machine: a Python environment, and nvcc where there is one."""

# Where the environment has headers, nanobind's sources, and nvcc.
_PROBE = """
import glob, json, os, shutil, sysconfig
import jaxlib, nanobind
pip_nvcc = glob.glob(os.path.join(sysconfig.get_path("platlib"), "nvidia", "*", "bin", "nvcc"))
print(json.dumps({
    "python": sysconfig.get_path("include"),
    "xla_ffi": os.path.join(os.path.dirname(jaxlib.__file__), "include"),
    "nanobind": os.path.dirname(nanobind.include_dir()),
    "nvcc": shutil.which("nvcc") or next(iter(pip_nvcc), ""),
}))
"""

_BUILD = """
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "xla_ffi",
    hdrs = glob(["xla_ffi/xla/ffi/**/*.h"]),
    includes = ["xla_ffi"],
)

cc_library(
    name = "python",
    hdrs = glob(["python/**/*.h"]),
    includes = ["python"],
)

filegroup(
    name = "nanobind_source",
    srcs = ["nanobind/src/nb_combined.cpp"],
)

cc_library(
    name = "nanobind",
    srcs = [":nanobind_source"],
    hdrs = glob([
        "nanobind/ext/robin_map/include/**/*.h",
        "nanobind/include/**/*.h",
        "nanobind/src/*.h",
    ]),
    copts = [
        "-std=c++17",
        "-fno-strict-aliasing",
        "-fvisibility=hidden",
    ],
    textual_hdrs = glob(
        ["nanobind/src/*.cpp"],
        exclude = ["nanobind/src/nb_combined.cpp"],
    ),
    includes = [
        "nanobind/ext/robin_map/include",
        "nanobind/include",
    ],
    deps = [":python"],
)
"""

def _python_environment_impl(repository_ctx):
    python = repository_ctx.which("python3")
    if not python:
        fail("there is no python3 on PATH")
    probe = repository_ctx.execute([python, "-c", _PROBE])
    if probe.return_code:
        fail("%s lacks what the build needs: pip install jaxlib nanobind\n%s" %
             (python, probe.stderr))
    found = json.decode(probe.stdout)
    if not repository_ctx.path(found["python"] + "/Python.h").exists:
        fail("%s has no Python.h in %s: install Python's headers" % (python, found["python"]))
    for folder in ["python", "xla_ffi", "nanobind"]:
        repository_ctx.symlink(found[folder], folder)
    repository_ctx.file("BUILD.bazel", _BUILD)
    repository_ctx.file("tools.bzl", "PYTHON = %r\nNVCC = %r\n" % (str(python), found["nvcc"]))

python_environment = repository_rule(
    implementation = _python_environment_impl,
    configure = True,
    doc = "The python3 of PATH as a repository: its headers, XLA's and nanobind's.",
    environ = ["PATH"],
    local = True,
)
