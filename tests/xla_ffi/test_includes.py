"""Rooms of xla_ffi/ include only those that they may."""

import re

from compiling import ROOT

# The rooms that each includes, besides itself. So nobody includes the modules.
MAY_INCLUDE = {
    "common": set(),
    "native": {"common"},
    "published": {"common"},
    "modules": {"common", "native", "published"},
}
SOURCES = [p for p in (ROOT / "xla_ffi").rglob("*") if p.suffix in (".h", ".cc", ".cu", ".cuh")]


def test_rooms_include_only_those_that_they_may():
    assert {p.relative_to(ROOT / "xla_ffi").parts[0] for p in SOURCES} == set(MAY_INCLUDE)
    for path in SOURCES:
        room = path.relative_to(ROOT / "xla_ffi").parts[0]
        for included in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            if included.startswith("xla/"):
                continue
            # Named from xla_ffi/ on, so that the room shows.
            assert (ROOT / "xla_ffi" / included).is_file(), f"{path} includes {included}"
            assert included.split("/")[0] in MAY_INCLUDE[room] | {room}, f"{path}: {included}"


def test_sources_say_what_they_hold():
    for path in SOURCES:
        assert path.read_text().startswith("// "), path
