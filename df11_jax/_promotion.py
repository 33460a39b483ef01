"""Broadcasting and conversion of dtypes in the programs here, whatever users allow in their own."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Args = ParamSpec("Args")
Result = TypeVar("Result")


def with_promotion(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """The same function, where users have JAX refuse to promote ranks or dtypes in their code."""

    @functools.wraps(function)
    def inner(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return inner
