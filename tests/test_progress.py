"""Progress as a process shows it, whose clock goes as it is told to."""

import os
import pty
import re
import subprocess
import sys
import termios

import pytest

# Each look at the clock is some seconds after the last one.
PROGRAM = """
import itertools, sys
from df11_jax import _progress
_progress.monotonic = itertools.count(0, float(sys.argv.pop(1))).__next__
"""
BAR = """
total, count = int(sys.argv[1]), int(sys.argv[2])
with _progress.ProgressBar("copy", total, unit=sys.argv[3], show=True) as bar:
    for i in range(count):
        bar.update(f"tensor {i}", total // count)
"""
COMMAND = """
from df11_jax.cli import main
main()
"""


def process(program, seconds, *args):
    command = [sys.executable, "-P", "-c", PROGRAM + program, str(seconds), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)


@pytest.mark.parametrize(
    ("seconds", "count", "shown"),
    [
        (1, 9, []),  # quick
        (9.99, 1, []),
        (10, 3, [0, 1, 2]),
        (4, 8, [2, 5]),  # after 12 and 24 seconds
        (3, 8, [3, 7]),
        (1000, 2, [0, 1]),
    ],
)
def test_lines_of_a_pipe(seconds, count, shown):
    ended = process(BAR, seconds, 1024 * count, count, "B")
    assert ended.stdout == ""
    assert [int(line.rpartition(" ")[2]) for line in ended.stderr.splitlines()] == shown


def test_what_a_line_says():
    first, *_, last = process(BAR, 1500, 2**20, 4, "B").stderr.splitlines()
    assert first == "copy: 25%, 256 KiB of 1 MiB, 1:15:00 left, at tensor 0"
    assert last == "copy: 100%, 1 MiB of 1 MiB, 0:00 left, at tensor 3"
    (line,) = process(BAR, 65, 3000, 1, "tokens").stderr.splitlines()
    assert line == "copy: 100%, 3,000 of 3,000 tokens, 0:00 left, at tensor 0"


@pytest.mark.parametrize(("total", "count"), [(0, 3), (5, 0)])
def test_nothing_to_do(total, count):
    assert process(BAR, 100, total, count, "B").stderr == ""


def test_a_bar_on_a_terminal():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-P", "-c", PROGRAM + BAR, "1000", "2048", "2", "tokens"]
    with subprocess.Popen(command, stderr=theirs) as child:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # the terminal's other side is closed
            pass
    os.close(ours)
    assert child.returncode == 0
    assert b"\r" in shown and b"copy: 100%" in shown and b"2.05k/2.05k" in shown
    assert b" left, at " not in shown


@pytest.mark.slow
def test_the_demo():
    pytest.importorskip("flax", reason="needs flax: pip install 'df11_jax[demo]'")
    ended = process(COMMAND, 10, "demo", "--tokens", 20)
    assert "All 20 tokens" in ended.stdout and "generate:" not in ended.stdout
    line = re.compile(r"generate: \d+%, (\d+) of 160 tokens, [\d:]+ left, at (plain|compressed)")
    counts = [int(line.fullmatch(shown)[1]) for shown in ended.stderr.splitlines()]
    assert counts == sorted(set(counts)) and (counts[0], counts[-1]) == (1, 160)


@pytest.mark.slow
def test_generated_text_stays_as_it_is(tmp_path):
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'df11_jax[models]'")
    import families

    directory = families.write_family(tmp_path / "hf" / "qwen2", "qwen2", shards=2)
    arguments = ("generate", directory, "--prompt", "It is raining.", "--tokens", 8)
    quick, slow = (process(COMMAND, seconds, *arguments) for seconds in (0, 10))
    assert slow.stdout == quick.stdout and "It is raining." in slow.stdout
    assert "load: 100%" in slow.stderr and "load:" not in quick.stderr
    assert "generate: 50%, 4 of 8 tokens, " in slow.stderr and "generate:" not in quick.stderr
