"""What the kernels are given, as the interpreter's tests write it down; which weights."""

import ctypes
import dataclasses
import re
import subprocess

import count_sass
import jax.numpy as jnp
import numpy as np
from compiling import ROOT
from payloads import random_weights

from df11_jax import _layout
from df11_jax._compress_tensor import compress_as
from df11_jax._layout import make_layout

UNWRITTEN = 0x5A5A
RNG = np.random.default_rng(0)


class View(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("size", "batch", "k", "n")),
        ("steps", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("along_columns", "is_flat")),
    ]


class BatchAxis(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("size", "payload_stride", "index_stride")]


class TensorSlices(ctypes.Structure):
    _fields_ = [
        ("view", View),
        ("geometry", ctypes.c_uint32),
        ("bands", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("stack", "batch", "exponents_words")),
        *((name, ctypes.c_uint64) for name in ("index", *_layout.PAYLOAD, "out")),
        ("code_bits", ctypes.c_int),
        ("batch_axes", ctypes.c_int),
        ("axes", BatchAxis * 4),
    ]


def compile_ptx(folder, text, arch="90"):
    source, ptx = folder / "kernel.cu", folder / "kernel.ptx"
    source.write_text(text)
    include = f"-I{ROOT / 'xla_ffi'}"
    command = [count_sass.find_tool("nvcc"), "-std=c++17", include, f"-arch=compute_{arch}", "-ptx"]
    subprocess.run([*command, "-o", ptx, source], check=True)
    return ptx.read_text()


def without(ptx, line):
    lines = ptx.splitlines()
    # Instead of waiting for a barrier's phase, it is said to be complete.
    is_wait = re.search(r"mbarrier\.(try|test)_wait", lines[line])
    instead = "setp.eq.u32 complete, 0, 0;" if is_wait else ""
    return "\n".join([*lines[:line], instead, *lines[line + 1 :]])


def unnoticed(ptx, entry, orders, is_noticed):
    """Of a kernel's instructions that match `orders`, those whose lack is not noticed."""
    lines = ptx.splitlines()
    entries = [i for i, line in enumerate(lines) if ".entry" in line]
    (begin,) = (i for i in entries if entry in lines[i])
    end = min((i for i in entries if i > begin), default=len(lines))
    places = [i for i in range(begin, end) if re.match(rf"\s*({orders})\b", lines[i])]
    assert len(places) >= 4
    return [f"{i}: {lines[i].strip()}" for i in places if not is_noticed(without(ptx, i))]


def fill_tensor(memory, tensor, array, index, moved, bands=False):
    """Writes down what is to be decoded; returns the view of it."""
    view = array.layout.view
    tensor.view = View(*dataclasses.astuple(view))
    tensor.geometry = int(_layout.pack_header(array.layout)[3])
    tensor.code_bits = array.layout.code_bits
    tensor.bands = view.bands if bands else 0
    view = view.band if bands else view
    tensor.stack, tensor.batch = (array.stack_shape or (1,))[0] * (tensor.bands or 1), len(index)
    tensor.exponents_words = array.exponents.shape[-1]
    tensor.index = memory.allocate(np.array(index, np.int32))
    for name in _layout.PAYLOAD:
        part = np.asarray(getattr(array, name))
        setattr(tensor, name, memory.allocate(part, moved.get(name, 0)))
    out = np.full(len(index) * view.size, UNWRITTEN, np.uint16)
    tensor.out = memory.allocate(out, moved.get("out", 0), writable=True)
    tensor.batch_axes, tensor.axes[0] = 1, BatchAxis(len(index), 0, 1)
    return view


def compressed(weights, *, steps=8, code_bits=12, stack_axes=0, **matrix):
    """A compressed tensor whose chunks have so many steps, and codes at most so many bits."""
    layout = make_layout(weights.shape[stack_axes:], **matrix)
    return compress_as(weights, dataclasses.replace(layout, steps=steps, code_bits=code_bits), "w")


def damaged(good, i):
    """A compressed tensor with another bit somewhere in one of its arrays, the `i`th in turn."""
    name = _layout.PAYLOAD[i % 5]
    words = np.array(getattr(good, name))
    some = words[3:4] if name == "header" else words  # kernels look at one word of that
    some[RNG.integers(len(some))] ^= np.uint32(1) << np.uint32(RNG.integers(32))
    return dataclasses.replace(good, **{name: jnp.asarray(words)})


def to_bits(weights):
    return np.asarray(weights).reshape(-1).view(np.uint16)


def sprinkled(shape, count):
    """Normal weights, some of which are any bits."""
    weights = np.array(random_weights(shape))
    bits = weights.reshape(-1).view(np.uint16)
    bits[RNG.integers(0, bits.size, count)] = RNG.integers(0, 2**16, count)
    return weights


def every_pattern():
    return RNG.permutation(2**16).astype(np.uint16).reshape(256, 256).view(jnp.bfloat16)
