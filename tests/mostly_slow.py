"""Cases for `pytest.mark.parametrize`, most of which run only where slow tests do."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], fast: int = 1) -> list[Any]:
    """The cases, of which all but the first `fast` are marked `slow`.

    For what is tested in several ways that seldom differ: `pytest` tries one, CI all. A case that
    is a tuple has a value for each parameter.
    """
    each = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*case, marks=[] if i < fast else [pytest.mark.slow])
        for i, case in enumerate(each)
    ]
