"""Sphinx configuration: pages in Markdown, the reference from docstrings.

    pip install ".[docs]" && sphinx-build -W --keep-going docs build/docs

It documents the df11_jax that Python imports: the installed one, or with `PYTHONPATH=.` the source
tree. Neither a GPU nor a network is needed.
"""

import importlib
import re
import typing
from importlib.metadata import version as _version
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

# Before anything imports jaxtyping: annotations then read `UInt32[Array, "words"]`, without the
# private modules that arrays come from.
typing.GENERATING_DOCUMENTATION = "df11_jax"  # type: ignore[attr-defined]

PUBLIC_MODULES = (
    "df11_jax",
    "df11_jax.checkpoints",
    "df11_jax.published",
    "df11_jax.orbax",
    "df11_jax.linen",
    "df11_jax.nnx",
    "df11_jax.models",
)

project = "df11_jax"
version = release = _version("df11_jax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]

myst_heading_anchors = 3  # as on GitHub, so that links into pages work in both places
highlight_language = "none"  # blocks that do not name theirs are commands, formulas, drawings

autodoc_default_options = {"members": True, "special-members": "__getitem__"}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the class's signature has them

html_theme = "furo"
html_title = f"df11_jax {release}"
html_copy_source = False
html_show_copyright = False


def setup(app: Sphinx) -> None:
    """Registers what follows."""
    app.connect("autodoc-process-docstring", _translate_code, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _shorten_classes)
    app.connect("autodoc-skip-member", _skip_noise)
    app.connect("env-check-consistency", _require_all_public_names)


def _translate_code(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings write code as Markdown does, `name`; names of what is documented become links."""
    top_level = importlib.import_module("df11_jax").__all__
    own = vars(importlib.import_module(max(m for m in PUBLIC_MODULES if name.startswith(m))))

    def translate(match: re.Match[str]) -> str:
        code = " ".join(match[1].split())
        if code in top_level and code not in own:
            marked = f":py:obj:`{code} <df11_jax.{code}>`"
        elif re.fullmatch(r"[A-Za-z_][\w.]*", code):
            marked = f":py:obj:`{code}`"
        else:
            marked = f"``{code}``"
        after = match.string[match.end() : match.end() + 1]
        return marked + ("\\ " if after.isalnum() else "")  # `DF11Array`s

    text = re.sub(r"(?<![`:\w])`([^`]+)`(?!`)", translate, "\n".join(lines))
    lines[:] = text.split("\n")


def _shorten_classes(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, result: str
) -> tuple[str, str] | None:
    """A default that is a class reads as its name."""
    return signature and (re.sub(r"<class '([\w.]+)'>", r"\1", signature), result)


def _skip_noise(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leaves out fields of classes: the class's docstring tells what they are."""
    is_field = type(obj).__name__ == "_tuplegetter" or (what == "class" and name == "dtype")
    return True if is_field and not isinstance(obj, property) else None


def _require_all_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    documented = env.domains["py"].objects
    for module in PUBLIC_MODULES:
        for name in importlib.import_module(module).__all__:
            if f"{module}.{name}" not in documented:
                message = "%s.%s is public, and is not in the reference (has it a docstring?)"
                logging.getLogger(__name__).warning(message, module, name)
