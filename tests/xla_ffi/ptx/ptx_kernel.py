"""Reads PTX: the instructions, labels and symbols of a kernel."""

import dataclasses
import functools
import re

SHARED_BASE = 1 << 10  # address of the first byte of shared memory, as on a GPU


@dataclasses.dataclass
class Instruction:
    """One line: `@!%p bra label;`."""

    line: int
    guard: str
    negated: bool
    name: tuple[str, ...]
    operands: list[str]


# What follows is asked for each time that an instruction runs.


@functools.cache
def names_in(operand: str) -> list[str]:
    """The registers of `{%r1, %r2}`, or of one."""
    return re.findall(r"[%\w]+", operand)


@functools.cache
def parse_address(operand: str) -> tuple[str, int]:
    """Of `[%rd1+16]`: the register or symbol, and the bytes behind it."""
    match = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
    return match[1], int(match[2] or 0)


class Kernel:
    """An entry of a PTX module."""

    def __init__(self, ptx: str, entry: str) -> None:
        """Reads the entry whose name contains `entry`."""
        lines = ptx.splitlines()
        (start,) = (i for i, text in enumerate(lines) if ".entry" in text and entry in text)
        self.symbols: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.code: list[Instruction] = []
        self.static_shared, depth, dynamic = 0, 0, []
        for text in lines[:start]:
            if match := re.match(r"\.extern \.shared .* (\w+)\[\]", text):
                dynamic.append(match[1])
        for number, text in enumerate(lines[start:], start + 1):
            text = text.split("//")[0].strip()
            if match := re.match(r"\.param .* (\w+)\[(\d+)\]|\.param .* (\w+)", text):
                self.symbols[match[1] or match[3]] = 0
                self.param_bytes = int(match[2] or 8)
            elif match := re.match(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", text):
                align, size = int(match[1]), int(match[3])
                begin = -(-self.static_shared // align) * align
                self.symbols[match[2]] = SHARED_BASE + begin
                self.static_shared = begin + size
            elif match := re.match(r"(\$?\w+):", text):
                self.labels[match[1]] = len(self.code)
            elif match := re.match(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*([^;]*);", text):
                name = tuple(match[3].split("."))
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s|]+", match[4])
                self.code.append(
                    Instruction(number, match[2] or "", bool(match[1]), name, operands)
                )
            depth += text.count("{") - text.count("}")
            if "}" in text and depth == 0:
                break
        # What is dynamic comes behind it, aligned for anything.
        self.static_shared = -(-self.static_shared // 1024) * 1024
        for name in dynamic:
            self.symbols[name] = SHARED_BASE + self.static_shared


@functools.lru_cache(maxsize=8)
def read_kernel(ptx: str, entry: str) -> Kernel:
    """The same kernel, for launches that do not change it."""
    return Kernel(ptx, entry)
