"""The order of the rooms, as docs/contributing.md draws it: imports go up, and never in circles."""

import collections
import graphlib

import grimp
import pytest

# From the top: a room imports only from rooms before it. Rooms in one line do not import each
# other. The core is all modules that lie in no folder, but for those that are named.
ROOMS = [
    ["core"],
    ["linen", "nnx"],
    ["_files"],
    ["published", "orbax"],
    ["checkpoints"],
    ["models"],
    ["bench", "doctor", "demo"],
    ["cli"],
]
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


@pytest.fixture(scope="module")
def imports():
    """What each file imports, imports in functions and under TYPE_CHECKING included."""
    graph = grimp.build_graph("df11_jax", cache_dir=None)
    return {
        module: graph.find_modules_directly_imported_by(module) for module in sorted(graph.modules)
    }


def room_of(module):
    first = module.split(".")[1:2]
    return first[0] if first and first[0] in FLOORS else "core"


def test_every_folder_is_a_room(imports):
    folders = {module.split(".")[1] for module in imports if module.count(".") > 1}
    assert folders <= FLOORS.keys()


def test_rooms_import_from_rooms_above(imports):
    wrong = [
        f"{module} -> {imported}"
        for module, found in imports.items()
        for imported in sorted(found)
        if room_of(module) != room_of(imported)
        and FLOORS[room_of(imported)] >= FLOORS[room_of(module)]
    ]
    assert not wrong


def test_no_private_module_of_another_package(imports):
    wrong = []
    for module, found in imports.items():
        for imported in sorted(found):
            package, _, name = imported.rpartition(".")
            is_private = name.startswith("_") and package not in ("", "df11_jax")
            if is_private and room_of(imported) != room_of(module):
                wrong.append(f"{module} -> {imported}")
    assert not wrong


def test_no_circles(imports):
    graphlib.TopologicalSorter(imports).prepare()  # raises a CycleError that has the circle


def test_no_name_three_times(imports):
    names = collections.Counter(
        module.rpartition(".")[2].strip("_") for module in imports if module.count(".") > 1
    )
    assert not [name for name, count in names.items() if count > 2]
