"""`DF11Array`: a losslessly compressed bfloat16 tensor as a pytree."""

import dataclasses
import json
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any, Self

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int32, UInt32

from df11_jax import _layout, _parts
from df11_jax._array_operators import ArrayOperators
from df11_jax._host_arrays import BFLOAT16
from df11_jax._layout import Layout
from df11_jax._reads import read
from df11_jax._slices import decode_slices, decode_stacks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DF11Array(ArrayOperators):
    """A bfloat16 tensor, losslessly compressed, in five arrays on the device.

    It is a pytree like any other: it can be passed to jitted functions, donated, sharded, saved and
    mapped over. `df11_jax.decompress` returns the tensor, bit for bit.

    A stack of equally shaped tensors, such as the layers of a model, has the same leading axes on
    all five arrays. Operations on the arrays that take these axes away or put new ones in front
    (`jax.lax.scan`, `jax.vmap`, `jax.tree.map(lambda x: x[i], a)`) make the compressed slice or
    stack.

    Where JAX wants an array (`jax.numpy`, operators, `.T`, `.astype`), a tensor without stack axes
    is decompressed, each time anew. Primitives of `jax.lax`, and numpy, do not take it.

    Invariants: all arrays are uint32; their shapes are `stack_shape + layout.parts + (words,)`,
    where the number of words follows from `layout` (but for `exponents`). docs/format.md specifies
    their content.

    Attributes:
        header: the format version, the shape and the layout of each slice.
        codebook: the code of each slice.
        chunk_offsets: the start of each chunk in `exponents`.
        exponents: the coded exponents, a multiple of 4 words for each slice.
        sign_mantissa: the sign and mantissa of each weight.
        layout: the shape of one slice, how it is a matrix, and how that is cut; static.
    """

    header: UInt32[Array, "*stack_and_parts 28"]
    codebook: UInt32[Array, "*stack_and_parts 36"]
    chunk_offsets: UInt32[Array, "*stack_and_parts chunks_and_end"]
    exponents: UInt32[Array, "*stack_and_parts words"]
    sign_mantissa: UInt32[Array, "*stack_and_parts quads"]
    layout: Layout = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_payload(cls, payload: Iterable[Any], layout: Layout) -> Self:
        """Makes one of its five arrays, in the order of `payload`."""
        header, codebook, chunk_offsets, exponents, sign_mantissa = payload
        return cls(header, codebook, chunk_offsets, exponents, sign_mantissa, layout)

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """The shape of one slice; in a `jax.shard_map`, of what a device has of it."""
        return _parts.shape_of(self.parts, self.layout)

    @property
    def parts(self) -> tuple[int, ...]:
        """The number of parts into which each axis of a slice is divided; empty if it is not."""
        return _parts.split_leading(self.header.shape, self.layout)[1]

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Where it is: the sharding that the tensor would have, and that its arrays have.

        Raises:
            AttributeError: its arrays are not on devices, such as traced ones.
        """
        return self.header.sharding

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading axes, which all five arrays have in common."""
        return _parts.split_leading(self.header.shape, self.layout)[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that this stands for."""
        return self.stack_shape + self.slice_shape

    @property
    def ndim(self) -> int:
        """The number of axes, those of the stack included."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """bfloat16."""
        return BFLOAT16

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the bfloat16 tensor that this stands for."""
        return 2 * self.size

    @property
    def compressed_nbytes(self) -> int:
        """The bytes of the five arrays."""
        return sum(4 * math.prod(array.shape) for array in self.payload)

    @property
    def payload(self) -> tuple[Array, Array, Array, Array, Array]:
        """The five arrays, in the order of the specification."""
        return (
            self.header,
            self.codebook,
            self.chunk_offsets,
            self.exponents,
            self.sign_mantissa,
        )

    def __getitem__(self, index: Any) -> Any:
        """The compressed slice, or slices, at `index` along the first stack axis.

        Of a tensor without stack axes, `a[...]` is all of it, decompressed: so modules read it that
        read their parameters like that, as Flax's do.

        Args:
            index: an integer, a slice, or an integer array, also a traced one.

        Raises:
            IndexError: an integer is out of bounds.
            TypeError: there is no stack axis, or the index is neither an integer nor a slice nor an
                integer array.
        """
        if not self.stack_shape:
            return _whole(self, index)
        length = self.stack_shape[0]
        if not isinstance(index, (slice, jax.Array, np.ndarray)):
            try:
                if isinstance(index, bool):
                    raise TypeError  # to an array, True is a mask; to Python, the number 1
                index = operator.index(index)
            except TypeError:
                raise TypeError(
                    "the stack axis of a DF11Array is indexed by an integer, a slice or an "
                    f"integer array, got {index!r}"
                ) from None
            # jax would clamp, and iteration over a DF11Array would never end.
            if not -length <= index < length:
                raise IndexError(f"index {index} is out of bounds for a stack of {length}")
        return jax.tree.map(lambda array: array[index], self)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(
            f"{self!r} cannot be assigned to: compressed weights are constants. Change them in "
            "df11_jax.decompress(a).at[index].set(value), and compress that"
        )

    def __jax_array__(self) -> BFloat16[Array, "..."]:
        if self.stack_shape:
            raise TypeError(
                f"{self!r} is a compressed stack, which is not decompressed as a whole without "
                "being told to. df11_jax.scan_blocks(block, x, params) gives the weights of one "
                "block after the other, a[i] is one slice, df11_jax.decompress(a) is all of it"
            )
        return decode_stacks([self], ["tensor"])[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError(
            f"{self!r} is not decompressed and copied to the host without being told to: "
            "np.asarray(df11_jax.decompress(a))"
        )

    # The methods of flax.linen's boxes: linen calls them for parameters that stand for others, of
    # which this class is one (`_flax.py`).

    def unbox(self) -> BFloat16[Array, "..."]:
        """The decompressed tensor."""
        return read(self)

    def replace_boxed(self, value: Any) -> Any:
        """The value itself: whatever takes the place of the tensor is not compressed."""
        return value

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> "DF11Array":
        """The same array: the arrays that are stacked have the new axis already."""
        return self

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> "DF11Array":
        """The same array, from whose arrays the first stack axis is then taken.

        Raises:
            ValueError: the axis is not the first one of the stack.
        """
        if index != 0 or not self.stack_shape:
            raise ValueError(
                f"{self!r} cannot be mapped over axis {index}: a compressed parameter can be "
                "mapped over its stack axes, starting with axis 0. compress_params(..., "
                "stacked=...) makes one, in front, of the axis that stack_axis=... says; "
                "df11_jax.linen.scan in the place of nn.scan finds it there"
            )
        return self

    def __repr__(self) -> str:
        # Leaves may be tracers, shapes, or any other object that a tree_map put there.
        try:
            shape = ",".join(map(str, self.shape))
            if not self.size:
                return f"DF11Array(bfloat16[{shape}])"
            bits = 8 * self.compressed_nbytes / self.size
            parts = f", parts={list(self.parts)}" if math.prod(self.parts) > 1 else ""
            return f"DF11Array(bfloat16[{shape}], {bits:.2f} bits/weight{parts})"
        except Exception:
            leaves = ", ".join(
                f"{name}={type(getattr(self, name, None)).__name__}" for name in _layout.PAYLOAD
            )
            return f"DF11Array({leaves}, layout={self.layout!r})"


def _whole(a: "DF11Array | DF11Slice", index: Any) -> BFloat16[Array, "..."]:
    """`a[...]`, decompressed, of what has no stack axis; raises TypeError for another index."""
    if index is ...:
        return a.__jax_array__()
    raise TypeError(
        f"{a!r} has no stack axis to index: only whole slices can be taken out of a compressed "
        "stack. To index the weights, df11_jax.decompress(a)[index]. What code of others indexes, "
        "such as an embedding, can be left plain: "
        "compress_params(..., predicate=lambda path, leaf: 'embed' not in path)"
    )


jax.export.register_pytree_node_serialization(
    DF11Array,
    serialized_name="df11_jax.DF11Array",
    serialize_auxdata=lambda static: json.dumps(static[0].to_json()).encode(),
    deserialize_auxdata=lambda data: (Layout.from_json(json.loads(data)),),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DF11Slice(ArrayOperators):
    """One slice of a compressed stack, or several, which are not taken out of it.

    `decompress`, and `dot` and `take` for one slice, read it where it lies: XLA copies no part of
    the stack for that. The index may be computed in a traced program, as that of the experts which
    tokens choose. Where an array of indices has an element -1, or a computed index is -1, nothing
    is decompressed, and the weights there are not specified: so as many slices as are wanted fit in
    an array of a static size. An index that is known before the program runs is checked, and
    -1 alone is none; a computed one is clamped to the stack, but for -1.

    Where JAX wants an array, it is decompressed, each time anew, as a `DF11Array` is.

    Attributes:
        stack: the stack; several stack axes count as one.
        index: the index of the slice, or an array of indices.
    """

    stack: DF11Array
    index: Int32[Array, "*batch"]

    def __post_init__(self) -> None:
        if isinstance(self.stack, (jax.Array, np.ndarray)):
            raise TypeError(
                f"DF11Slice: expected a stack that is a DF11Array, got {self.stack.dtype}"
                f"{list(self.stack.shape)}, which is plain, as what is small or is not bfloat16 "
                "stays: index it, array[index]"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the slice; of several, with the axes of the index in front."""
        return (*np.shape(self.index), *self.stack.slice_shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weights, bfloat16."""
        return BFLOAT16

    @property
    def ndim(self) -> int:
        """The number of axes, those of the index included."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> BFloat16[Array, "..."]:
        return _whole(self, index)

    __setitem__ = DF11Array.__setitem__

    def __jax_array__(self) -> BFloat16[Array, "..."]:
        return decode_slices([self.stack], self.index, names=["tensor"])[0]

    __array__ = DF11Array.__array__

    # To flax.linen it is a box, like a `DF11Array`.

    def unbox(self) -> BFloat16[Array, "..."]:
        """The decompressed slice."""
        return read(DF11Slice(self.stack, jnp.asarray(self.index)))

    replace_boxed = DF11Array.replace_boxed

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> Any:
        """Raises ValueError: what it stands for is a tensor that is not decompressed yet."""
        raise ValueError(
            f"a slice of {self.stack!r} cannot be mapped over: fused=True passes the parameters of "
            "a layer compressed. Leave it out where modules in a layer map over their parameters"
        )


jax.export.register_pytree_node_serialization(
    DF11Slice,
    serialized_name="df11_jax.DF11Slice",
    serialize_auxdata=lambda static: b"",
    deserialize_auxdata=lambda data: (),
)


def is_df11_or_slice(leaf: Any) -> bool:
    """Whether a leaf is a `DF11Array` or a `DF11Slice`."""
    return isinstance(leaf, DF11Array | DF11Slice)


def is_df11(leaf: Any) -> bool:
    """Whether a leaf is a `DF11Array`: the `is_leaf` of this package's tree functions."""
    return isinstance(leaf, DF11Array)
