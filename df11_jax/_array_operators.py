"""What an array can do, for compressed tensors that are decoded where it is asked of them."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array


def _both(function: Callable[[Any, Any], Any]) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """An operator of the decoded tensor on the left, and of one on the right."""

    def left(self: Any, other: Any) -> Array:
        return function(self.__jax_array__(), other)

    def right(self: Any, other: Any) -> Array:
        return function(other, self.__jax_array__())

    return left, right


def _method(name: str) -> Callable[..., Array]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Array:
        return getattr(self.__jax_array__(), name)(*args, **kwargs)

    method.__name__, method.__doc__ = name, f"`{name}` of the decompressed tensor."
    return method


# What `==` compares with element by element; with all else, it is the identity.
_NUMBERS = (int, float, complex, np.generic, np.ndarray, jax.Array)


class ArrayOperators:
    """Operators and methods of an array, for a class that has `__jax_array__`.

    JAX asks for `__jax_array__` in the functions of `jax.numpy` and in operators of its own arrays
    only. `==` of two such objects stays the identity, by which pytrees and dictionaries know them;
    with a number or an array on the other side, elements are compared.
    """

    __array_ufunc__ = None  # numpy leaves operators with its arrays to those below

    __add__, __radd__ = _both(operator.add)
    __sub__, __rsub__ = _both(operator.sub)
    __mul__, __rmul__ = _both(operator.mul)
    __matmul__, __rmatmul__ = _both(operator.matmul)
    __truediv__, __rtruediv__ = _both(operator.truediv)
    __floordiv__, __rfloordiv__ = _both(operator.floordiv)
    __mod__, __rmod__ = _both(operator.mod)
    __pow__, __rpow__ = _both(operator.pow)
    __lt__, __gt__ = _both(operator.lt)
    __le__, __ge__ = _both(operator.le)
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> Any:
        return self.__jax_array__() == other if isinstance(other, _NUMBERS) else NotImplemented

    def __ne__(self, other: object) -> Any:
        return self.__jax_array__() != other if isinstance(other, _NUMBERS) else NotImplemented

    def __jax_array__(self) -> Array:
        raise NotImplementedError  # the class that has these operators says what it stands for

    def __neg__(self) -> Array:
        return -self.__jax_array__()

    def __pos__(self) -> Array:
        return +self.__jax_array__()

    def __bool__(self) -> bool:
        return bool(self.__jax_array__())

    def __abs__(self) -> Array:
        return abs(self.__jax_array__())

    @property
    def T(self) -> Array:  # noqa: N802
        """`T` of the decompressed tensor."""
        return self.__jax_array__().T

    @property
    def mT(self) -> Array:  # noqa: N802
        """`mT` of the decompressed tensor."""
        return self.__jax_array__().mT

    astype = _method("astype")
    dot = _method("dot")
    mean = _method("mean")
    ravel = _method("ravel")
    reshape = _method("reshape")
    sum = _method("sum")
    swapaxes = _method("swapaxes")
    transpose = _method("transpose")
