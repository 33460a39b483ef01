"""What a program gives a GPU to do, from the list that XLA writes if told where to.

The list has a line for each thing that is launched (`kCustomCall` for the decoder), indented below
the loop or the CUDA graph (`kCommandBuffer`) that it is in.
"""

import pathlib
import re


def dump_options(folder: pathlib.Path | str, min_graph_size: int = 5) -> dict:
    """Compiler options to write the list, with graphs of so many launches (5: XLA's default)."""
    return {"xla_dump_to": str(folder), "xla_gpu_graph_min_graph_size": min_graph_size}


def read_thunks(folder: pathlib.Path | str) -> str:
    """The list of the one program that has been compiled."""
    # The first is written only if graphs were made.
    for stage in ("thunk_sequence_after_thunk_passes", "thunk_sequence"):
        if files := list(pathlib.Path(folder).glob(f"*.{stage}.txt")):
            (file,) = files
            return file.read_text()
    return ""


def decoder_in_graph(thunks: str) -> bool | None:
    """Whether the decoder's call is in a CUDA graph; None if there is no such call."""
    found, graph = None, None
    for line in filter(str.strip, thunks.splitlines()):
        indent = len(line) - len(line.lstrip())
        if graph is not None and indent <= graph:
            graph = None
        if "kCommandBuffer" in line:
            graph = indent
        elif "kCustomCall" in line:
            found = graph is not None
    return found


def loop_body(thunks: str) -> list[str]:
    """Kinds of what is launched in each step of the program's loop, and below it."""
    body = re.search(r"^\s*body:\n(.*)", thunks, re.DOTALL | re.MULTILINE)
    return re.findall(r"\bk[A-Z]\w+(?= +\[)", body[1]) if body else []
