"""What commands print and write beside checkpoints: tables and plots."""

import errno
import resource
import sys

import pytest
from matplotlib.figure import Figure

from df11_jax.cli._output import make_table, open_console, save_plot


@pytest.mark.parametrize("columns", ["0", "20"])
def test_tables_lose_nothing_in_narrow_terminals(capsys, monkeypatch, columns):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", columns)
    table = make_table(*"abcdefgh")
    table.add_row(*"ABCDEFGH")
    open_console().print(table)
    assert set("abcdefghABCDEFGH") <= set(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("plot.png", "plot.png", b"\x89PNG"),
        ("plot.SVG", "plot.SVG", b"<?xml"),
        ("plot", "plot.png", b"\x89PNG"),
        ("v1.", "v1.png", b"\x89PNG"),
    ],
)
def test_a_plot_is_in_the_format_that_its_name_says(tmp_path, name, file, content):
    save_plot(Figure(), str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_bytes().startswith(content)


def test_a_plot_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "plot.png"
    save_plot(Figure(), str(path))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            save_plot(Figure(), str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
