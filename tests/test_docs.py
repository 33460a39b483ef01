"""The pages: every Python block runs, and every command in them is one that there is."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from compiling import ROOT

from df11_jax.cli import _commands

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def examples(page: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and code of a page's blocks."""
    text = page.read_text()
    for block in FENCE.finditer(text):
        language, code = block.groups()
        if language.startswith("python"):
            assert language == "python", f"{page}: {language}: every example is to run"
            yield text[: block.start(2)].count("\n"), code


pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page.name == "README.md" else [pytest.mark.slow])
        for page in PAGES
        if list(examples(page))
    ],
    ids=lambda page: page.name,
)
def test_python_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, as they stand, in a folder with the files that its commands make."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "orbax")
    from doc_pages import CHECK, FILES

    monkeypatch.chdir(tmp_path)
    FILES.get(page.name, lambda: None)()
    names: dict[str, object] = {}
    for line, code in examples(page):
        # Errors then show the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), names)
    CHECK.get(page.name, lambda names: None)(names)


@pages
def test_commands_exist(page):
    for command in commands(page.read_text()):
        check_command(command)


COLLECT = """
import shlex, sys, pytest
for line in sys.argv[1:]:
    print(line)
    arguments = shlex.split(line, comments=True)[1:]
    assert pytest.main([*arguments, "-n", "0", "--collect-only", "-q"]) == 0, line
"""


@pytest.mark.slow
def test_pytest_finds_tests():
    """Of what a command names, its options and those of pyproject.toml leave something."""
    lines = {line for page in PAGES for line in commands(page.read_text())}
    lines = {line for line in lines if line.startswith("pytest ") and "tests/" in line}
    assert lines
    run = [sys.executable, "-P", "-c", COLLECT, *sorted(lines)]  # one process, which imports once
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pages
def test_linked_files_exist(page):
    # Within docs/, Sphinx checks links, and those to headings as well.
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", FENCE.sub("", page.read_text()))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("name", sorted(_commands.commands.commands))
def test_commands_of_help_exist(name):
    text = _commands.commands.commands[name].epilog or ""
    for command in commands("    ".join(text.splitlines(keepends=True))):
        check_command(command)


def test_faulty_commands_are_found():
    for command in (
        "df11-jax nothing",
        "df11-jax verify a b c",
        "df11-jax info a b",
        "df11-jax info a --nothing",
        "df11-jax compress a b --format zip",
        'pip install ".[nothing]"',
        "python tests/nothing.py",
        "pytest tests/nothing",
    ):
        with pytest.raises((click.UsageError, AssertionError)):
            check_command(command)


def commands(text: str) -> Iterator[str]:
    """The command lines of a page: of its blocks, and of code within its sentences."""
    blocks = [code for language, code in FENCE.findall(text) if not language.startswith("python")]
    blocks += re.findall(r"(?:^ {4}.*\n)+", FENCE.sub("", text), re.MULTILINE)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in line.split(" && "))
    yield from re.findall(r"`((?:df11-jax|pytest) [^`]*)`", FENCE.sub("", text))


def check_command(line: str) -> None:
    """Raises if it is a command of ours that cannot be meant."""
    if not line.startswith(("df11-jax ", "pip install ", "python ", "pytest ")):
        return
    program, *arguments = shlex.split(line, comments=True)
    if program in ("python", "pytest"):
        for path in (argument for argument in arguments if "/" in argument or ".py" in argument):
            assert (ROOT / path).exists(), f"{line}: there is no such file"
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"(?:^|\s)(?:\.|df11_jax)\[([\w,-]+)\]", " ".join(arguments)):
            assert set(extra.split(",")) <= set(project["optional-dependencies"]), line
    elif program == "df11-jax":
        _check_click(_commands.commands, program, arguments)


def _check_click(command: click.Command, name: str, arguments: list[str]) -> None:
    """Parses a command line, but for whether the files that it names are there."""
    context = click.Context(command, info_name=name)
    if isinstance(command, click.Group) and not arguments[0].startswith("-"):
        _, subcommand, rest = command.resolve_command(context, arguments)
        assert subcommand is not None
        # A command that is merely named is not to be complete.
        if rest:
            _check_click(subcommand, arguments[0], rest)
        return
    values, left, _ = command.make_parser(context).parse_args(arguments)
    if left:
        raise click.UsageError(f"{name}: {left} is left over")
    for parameter in command.params:
        value = values.get(parameter.name)
        given = isinstance(value, (str, bool, list, tuple))  # else the parser's mark for nothing
        if parameter.required and not given:
            raise click.UsageError(f"{name}: {parameter.name} is missing")
        if given and not isinstance(parameter.type, click.Path):
            parameter.type_cast_value(context, value)
