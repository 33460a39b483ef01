"""What does XLA make of sharded compressed blocks on four H100s? Compiles for them, without any.

    pip install "jax[cuda13]"
    python benchmarks/compile_sharded_for_gpu.py

Only shapes go in: the two largest matrices of a block of Llama-3.1-8B, in 32 layers, under
automatic axes of a mesh. Prints one line of JSON a program: bytes of weights and of temporary
memory on each device, calls of the decoder, and what devices exchange in a step.
"""

import json
import re

import h100  # first: it sets what XLA reads once
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from stack_shapes import EXPONENT_BITS

import df11_jax
from df11_jax import _layout

LAYERS, BATCH = 32, 8
SHAPES = {"up": (4096, 14336), "down": (14336, 4096)}

# By name: the mesh, how each matrix is divided, and how the batch is.
DIVISIONS = {
    "tensor parallel": ({"tp": 4}, {"up": (None, "tp"), "down": ("tp", None)}, None),
    "fsdp": ({"fsdp": 4}, {"up": ("fsdp", None), "down": ("fsdp", None)}, "fsdp"),
    "both": ({"fsdp": 2, "tp": 2}, {"up": ("fsdp", "tp"), "down": ("tp", "fsdp")}, "fsdp"),
}


def compressed(shape: tuple[int, int], where: NamedSharding) -> df11_jax.DF11Array:
    """The shapes of a compressed stack of matrices."""
    parts = [where.mesh.shape[axis] if axis else 1 for axis in where.spec[1:]]
    layout = _layout.make_layout(shape, parts=parts)
    view = layout.view
    words = (
        _layout.HEADER_WORDS,
        _layout.CODEBOOK_WORDS,
        view.chunks + 1,
        _layout.round_up(int(view.size * EXPONENT_BITS / 32), 4),
        view.sign_mantissa_words,
    )
    payload = [
        jax.ShapeDtypeStruct((LAYERS, *parts, count), jnp.uint32, sharding=where) for count in words
    ]
    return df11_jax.DF11Array.from_payload(payload, layout)


def plain(shape: tuple[int, int], where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((LAYERS, *shape), jnp.bfloat16, sharding=where)


def block(x, p, _):
    return x + jax.nn.silu(x @ p["up"]) @ p["down"], None


def main() -> None:
    for name, (axes, specs, batch) in DIVISIONS.items():
        devices = np.array(h100.devices(4)).reshape(tuple(axes.values()))
        mesh = Mesh(devices, tuple(axes))
        x = jax.ShapeDtypeStruct(
            (BATCH, SHAPES["up"][0]), jnp.bfloat16, sharding=NamedSharding(mesh, P(batch))
        )
        for kind in (plain, compressed):
            params = {
                key: kind(shape, NamedSharding(mesh, P(None, *specs[key])))
                for key, shape in SHAPES.items()
            }
            run = jax.jit(lambda x, p: df11_jax.scan_blocks(block, x, p)[0])
            compiled = run.lower(x, params).compile()
            memory, text = compiled.memory_analysis(), compiled.as_text()
            operation = r"(all-\w+|collective-\w+|reduce-scatter)(?:-start)?"
            exchanged = re.findall(rf"= \(?(\w+\[[\d,]*\]).*? {operation}\(", text)
            figures = {
                "program": f"{name}, {kind.__name__}",
                "weights": memory.argument_size_in_bytes,
                "temporary": memory.temp_size_in_bytes,
                "decode_calls": text.count('custom_call_target="df11_decode"'),
                "exchanged": sorted({f"{what} {array}" for array, what in exchanged}),
            }
            print(json.dumps(figures))


if __name__ == "__main__":
    main()
