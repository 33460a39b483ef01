"""The README's plot, and the figures that it is drawn of."""

import csv
import re
import subprocess
import sys

from compiling import ROOT

FIGURES = ROOT / "docs" / "figures.csv"


def read_figures():
    with FIGURES.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_plot_has_all_ways(tmp_path):
    target = tmp_path / "step.svg"
    subprocess.run([sys.executable, ROOT / "benchmarks" / "plot.py", target], check=True)
    ways = {row["way"] for row in read_figures()}
    for svg in (target, ROOT / "docs" / "images" / "step.svg"):
        texts = set(re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text()))
        assert ways <= texts


def test_figures_are_those_of_the_tables():
    rows = read_figures()
    assert len({(row["panel"], row["way"], row["batch"]) for row in rows}) == len(rows)
    text = (ROOT / "docs" / "figures.md").read_text()
    lines = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines()]
    for row in rows:
        assert any(cells[0] == row["batch"] and row["ms"] in cells[1:] for cells in lines), row
