"""Draws docs/images/step.svg, the plot of the README, of the figures in docs/figures.csv.

    pip install ".[plot]" && python benchmarks/plot.py [FILE]

The figures are those of the tables in docs/figures.md, which has the commands that measured them.
"""

import csv
import pathlib
import sys

import matplotlib

matplotlib.use("svg")  # before pyplot is imported
import matplotlib.pyplot as plt

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
TITLES = {
    "products": "The products of a step, rows of x",
    "step": "A whole step of generation, batch\n(before format version 2)",
}
COLORS = {
    "plain, XLA's defaults": "#57606a",
    "plain, cuBLAS in place": "#1f2328",
    "plain, 13 layers in host memory": "#bf8700",
    "compressed, dot": "#0969da",
    "compressed, decoded first": "#54aeff",
}


def main() -> None:
    target = sys.argv[1] if len(sys.argv) > 1 else DOCS / "images" / "step.svg"
    with open(DOCS / "figures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # Text as text, and nothing that differs from one run to the next.
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "df11_jax", "font.size": 9}
    figure, panels = plt.subplots(1, len(TITLES), figsize=(9.8, 3.6), layout="constrained")
    for ax, (panel, title) in zip(panels, TITLES.items(), strict=True):
        for way, color in COLORS.items():
            points = [
                (int(row["batch"]), float(row["ms"]))
                for row in rows
                if (row["panel"], row["way"]) == (panel, way)
            ]
            if points:
                ax.plot(*zip(*points, strict=True), "o-", label=way, color=color, markersize=4)
        ax.set_xscale("log", base=2)
        batches = sorted({int(row["batch"]) for row in rows if row["panel"] == panel})
        ax.set_xticks(batches, map(str, batches))
        if panel == "step":
            ax.set_yscale("log")
            ax.set_yticks([10, 20, 50, 100], ["10", "20", "50", "100"])
            ax.minorticks_off()
            ax.set_ylim(8, 200)
        else:
            ax.set_ylim(0, 18)
        ax.set_ylabel("ms a step")
        ax.set_title(title)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, loc="upper right")
    figure.suptitle("Llama-3.1-8B's shapes on one H200, 2026-11-26")
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
