"""Rules for what Bazel has none for: CUDA, and tests in the Python environment of PATH."""

load("@python_environment//:tools.bzl", "NVCC", "PYTHON")
load("@rules_cc//cc/common:cc_info.bzl", "CcInfo")

_SettingInfo = provider(doc = "The value of a flag.", fields = ["value"])

def _string_flag_impl(ctx):
    return [_SettingInfo(value = ctx.build_setting_value)]

string_flag = rule(
    implementation = _string_flag_impl,
    build_setting = config.string(flag = True),
)

def _nvcc_library_impl(ctx):
    library = ctx.actions.declare_file(ctx.label.name)
    contexts = [dep[CcInfo].compilation_context for dep in ctx.attr.deps]
    arguments = ctx.actions.args()
    arguments.add_all(["-shared", "-std=c++17", "-O3", "-diag-suppress=940", "--threads=2"])
    arguments.add("-Xcompiler=-fPIC,-fvisibility=hidden,-fno-strict-aliasing")
    architectures = ctx.attr._architectures[_SettingInfo].value.split(",")
    for a in architectures:
        arguments.add("-gencode=arch=compute_%s,code=sm_%s" % (a, a))

    # The last one also as PTX, for GPUs to come.
    last = architectures[-1]
    arguments.add("-gencode=arch=compute_%s,code=compute_%s" % (last, last))
    for context in contexts:
        arguments.add_all(context.includes, before_each = "-I")
        arguments.add_all(context.system_includes, before_each = "-isystem")
    arguments.add_all(ctx.files.srcs)
    arguments.add("-o", library)
    ctx.actions.run(
        executable = NVCC,
        arguments = [arguments],
        inputs = depset(ctx.files.srcs, transitive = [context.headers for context in contexts]),
        outputs = [library],
        mnemonic = "Nvcc",
        use_default_shell_env = True,  # nvcc looks for the host compiler on PATH
    )
    return [DefaultInfo(files = depset([library]))]

nvcc_library = rule(
    implementation = _nvcc_library_impl,
    doc = "A shared library, named as it is to be, compiled and linked by nvcc.",
    attrs = {
        "deps": attr.label_list(
            doc = "Whose headers are included.",
            providers = [CcInfo],
        ),
        "srcs": attr.label_list(
            allow_files = True,
            doc = "CUDA and C++ sources.",
        ),
        "_architectures": attr.label(default = "//:cuda_architectures"),
    },
)

def _python_test_impl(ctx):
    launcher = ctx.actions.declare_file(ctx.label.name)
    main = ctx.file.main

    # -P and PYTHONPATH: what is imported lies beside other data, not beside what links lead to.
    command = "PYTHONPATH=$PWD exec '%s' -P '%s'" % (PYTHON, main.short_path)
    ctx.actions.write(launcher, "#!/bin/sh\n%s\n" % command, is_executable = True)
    runfiles = ctx.runfiles([main] + ctx.files.data)
    return [DefaultInfo(executable = launcher, runfiles = runfiles)]

python_test = rule(
    implementation = _python_test_impl,
    doc = "A py_test by the Python that has jax, where rules_python would bring one of its own.",
    attrs = {
        "data": attr.label_list(
            allow_files = True,
            doc = "What the test imports and reads.",
        ),
        "main": attr.label(
            allow_single_file = [".py"],
            doc = "The script.",
            mandatory = True,
        ),
    },
    test = True,
)
