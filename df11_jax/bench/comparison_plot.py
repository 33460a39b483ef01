"""The plot of `df11-jax compare`."""

from typing import Any

from df11_jax.bench.comparison import Comparison


def draw(comparison: Comparison) -> Any:
    """Draws tokens a second and planned memory by batch, and the longest contexts.

    Args:
        comparison: with at least one row.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed (`pip install "df11_jax[plot]"`).
    """
    import matplotlib.pyplot as plt

    figure, (speed, memory, context) = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    batches = sorted({row.batch for row in comparison.rows})
    for name in comparison.weights:
        rows = [row for row in comparison.rows if row.way == name]
        run = [row for row in rows if row.not_run is None]
        rates = [comparison.token_rate(row) for row in run]
        speed.plot([row.batch for row in run], rates, "o-", label=name)
        planned = [(row.batch, row.plan.peak / 1e9) for row in rows if row.plan is not None]
        memory.plot(
            [batch for batch, _ in planned], [peak for _, peak in planned], "o-", label=name
        )
    for ax, what in ((speed, "tokens a second, all rows together"), (memory, "GB, planned peak")):
        ax.set_xscale("log")
        ax.set_xticks(batches, map(str, batches))
        ax.minorticks_off()
        ax.set_xlabel("batch")
        ax.set_ylabel(what)
    if any(row.not_run is None for row in comparison.rows):
        speed.set_yscale("log")
    memory.set_ylim(bottom=0)
    if any(row.not_run for row in comparison.rows) and comparison.budget is not None:
        memory.axhline(comparison.budget / 1e9, color="gray", linewidth=0.8, label="limit")
    speed.legend()
    memory.legend()
    context.bar(list(comparison.longest), list(comparison.longest.values()))
    context.set_ylabel("tokens of the longest context, batch 1")
    figure.suptitle(f"{comparison.model}; {comparison.device['name']}")
    return figure
