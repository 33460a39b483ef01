# /// script
# requires-python = ">=3.12"
# dependencies = ["df11_jax", "flax==0.12.3", "jax==0.9.2", "jaxlib==0.9.2", "optax==0.2.8"]
# ///
"""The oldest Flax for linen, which EasyDeL 0.3.0 pins: this project's own examples of linen."""

import importlib
import pathlib
import runpy

EXAMPLES = pathlib.Path(__file__).resolve().parents[1]


def main():
    """Runs them: they compare plain with compressed weights themselves."""
    for name in ("linen_model.py", "lora.py"):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    try:
        importlib.import_module("df11_jax.nnx")
    except ImportError as error:
        print(error)
        assert "needs flax 0.12.5 or newer, found 0.12.3" in str(error)
    else:
        raise AssertionError("df11_jax.nnx was imported")


if __name__ == "__main__":
    main()
