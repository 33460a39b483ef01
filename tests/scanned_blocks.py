"""A stack of blocks, plain and compressed, for several tests."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from payloads import random_weights

from df11_jax import compress, scan_blocks

LAYERS, WIDTH, HIDDEN = 8, 128, 512
TENSORS = 2  # compressed, of a block
BLOCK_BYTES = 2 * TENSORS * WIDTH * HIDDEN
X = random_weights((WIDTH,), 4, 1.0)

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="counts decodes, or reads programs, of the CPU backend"
)


@functools.cache
def make_params(layers=LAYERS):
    """Plain and compressed parameters of a stack of blocks; some leaves are plain in both."""
    plain = {
        "mlp": {
            "up": random_weights((layers, WIDTH, HIDDEN), 1, 0.1),
            "down": random_weights((layers, HIDDEN, WIDTH), 2, 0.1),
        },
        "scale": 1 + random_weights((layers, WIDTH), 3),
        "bias": jnp.linspace(0, 1, layers),
    }
    mlp = {name: compress(stack, stack_axes=1) for name, stack in plain["mlp"].items()}
    return plain, plain | {"mlp": mlp}


def block(x, params, _):
    hidden = jnp.tanh((x * params["scale"]) @ params["mlp"]["up"])
    x = x + (hidden @ params["mlp"]["down"]) + params["bias"].astype(x.dtype)
    return x.astype(jnp.bfloat16), jnp.max(x).astype(jnp.bfloat16)


def forward(params, x):
    return scan_blocks(block, x, params)


def loss(x, params, block=block):
    x, maxima = scan_blocks(block, x, params)
    return jnp.sum(x.astype(jnp.float32)) + jnp.sum(maxima.astype(jnp.float32))


def temp_bytes(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def instructions(text):
    """(computation, shape, opcode, line) of each instruction of an HLO module."""
    computation = ""
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?(%[\w.\-]+) \(.*\{$", line):
            computation = match[1]
        elif match := re.match(r"\s+(?:ROOT )?%[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", line):
            yield computation, match[1], match[2], line


def check_decodes_in_loop(text):
    """There is one call, in the body of a loop, and payloads reach it without being touched."""
    program = list(instructions(text))
    bodies = {name for *_, line in program for name in re.findall(r"body=(%[\w.\-]+)", line)}
    calls = [c for c, _, op, line in program if op == "custom-call" and "df11_decode" in line]
    assert len(calls) == 1
    assert calls[0] in bodies
    passing_on = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "constant"}
    for _, shape, opcode, line in program:
        if shape.startswith("u32["):
            words = math.prod(
                map(int, filter(None, re.match(r"u32\[(.*?)\]", shape)[1].split(",")))
            )
            assert words < 100 or opcode in passing_on, line
