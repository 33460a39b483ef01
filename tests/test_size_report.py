import jax.numpy as jnp
import numpy as np
from payloads import random_weights

import df11_jax


def params():
    return df11_jax.compress_params(
        {
            "layers": {"kernel": random_weights((2, 256, 64))},
            "scale": np.ones(10, np.float32),
        },
        stacked="^layers",
    )


class Converted:
    """A leaf of which JAX makes a new array each time."""

    def __init__(self, array):
        self.array = array

    def __jax_array__(self):
        return jnp.array(self.array)


def test_arrays_that_are_made_for_the_report_are_not_tied():
    leaves = {str(i): Converted(np.ones((200, 200), np.float32)) for i in range(8)}
    assert df11_jax.size_report(leaves).nbytes == 8 * 4 * 200 * 200


def test_report():
    tree = params()
    report = df11_jax.size_report(tree)
    kernel, scale = report.leaves
    assert kernel.path == "layers/kernel"
    assert kernel.shape == (2, 256, 64)
    assert kernel.compressed
    assert kernel.nbytes_before == 2 * 2 * 256 * 64
    assert kernel.nbytes == sum(a.nbytes for a in tree["layers"]["kernel"].payload)
    assert (scale.compressed, scale.nbytes_before, scale.nbytes) == (False, 40, 40)
    assert report.nbytes == kernel.nbytes + 40
    assert report.nbytes_before == kernel.nbytes_before + 40
    lines = str(report).splitlines()
    assert lines[0].split() == ["leaf", "shape", "dtype", "before", "now", "bits/weight"]
    assert lines[2].startswith("layers/kernel  2x256x64  bfloat16")
    assert lines[3].endswith("32.00 (plain)")
    assert lines[-1].startswith("total")


def test_empty():
    report = df11_jax.size_report({})
    assert report.nbytes == 0
    assert "total" in str(report)
    assert repr(report) == str(report)  # what a notebook shows


def test_plot():
    import matplotlib

    matplotlib.use("agg")
    axes = df11_jax.size_report(params()).plot()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["layers/kernel", "scale"]
    assert len(axes.patches) == 4
