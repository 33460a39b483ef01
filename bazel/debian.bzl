"""Stand-ins for repositories that Bazel 4 wants to download."""

def _written_repository_impl(repository_ctx):
    for path, text in repository_ctx.attr.files.items():
        repository_ctx.file(path, text)

written_repository = repository_rule(
    implementation = _written_repository_impl,
    attrs = {"files": attr.string_dict(doc = "What is in each file.")},
)
