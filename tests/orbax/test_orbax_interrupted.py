"""Saves that do not come to their end."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile
import time

import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1
from orbax_helpers import assert_same_tree, run_python, start_python
from payloads import random_weights

import df11_jax
from df11_jax.orbax import DF11Restore

pytestmark = pytest.mark.slow

KILLS = 25

# Forks a process for each save, so that not each of them has to import everything again. Before
# JAX has its threads, that is safe.
SERVER = """
import os, sys, traceback
import orbax.checkpoint as ocp
from orbax.checkpoint import v1
import df11_jax
from df11_jax.orbax import DF11Save
from test_orbax_interrupted import params

api, path = sys.argv[1:]
for line in sys.stdin:
    step = int(line)
    child = os.fork()
    if child:
        print("end", os.waitpid(child, 0)[1], flush=True)
        continue
    tree = params(step)
    print("saving", os.getpid(), flush=True)
    try:
        if api == "v1":
            v1.save_checkpointables(f"{path}/{step}", {"params": tree})
        else:
            with ocp.CheckpointManager(path) as manager:
                manager.save(step, args=ocp.args.Composite(params=DF11Save(tree)))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
"""


def params(step):
    """The same in every process, and another for each step."""
    weights = random_weights((4, 256, 512), seed=step)
    return df11_jax.compress_params({"layers": weights, "norm": weights[:, 0]}, stacked="layers")


def complete_steps(api, path):
    """What each API takes for complete, restored and verified."""
    if api == "v0":
        with ocp.CheckpointManager(path) as manager:
            args = ocp.args.Composite(params=DF11Restore())
            return {step: manager.restore(step, args=args).params for step in manager.all_steps()}
    steps = {}
    for folder in path.iterdir():
        if folder.name.isdigit():
            steps[int(folder.name)] = v1.load_checkpointables(folder, {"params": None})["params"]
    return steps


@pytest.mark.parametrize("api", ["v0", "v1"])
def test_killed(api, tmp_path):
    """At whatever moment a save is killed: earlier steps are there, and it is all or nothing."""
    moments = random.Random(0)
    folder = tmp_path / "steps"
    folder.mkdir()
    server = start_python(SERVER, api, folder, stdin=subprocess.PIPE)
    outcomes = []
    try:

        def save(step, kill_after=None):
            server.stdin.write(f"{step}\n")
            server.stdin.flush()
            word, child = server.stdout.readline().split()
            assert word == "saving"
            start = time.monotonic()
            if kill_after is not None:
                time.sleep(kill_after)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
            word, status = server.stdout.readline().split()
            assert word == "end"
            assert int(status) == 0 or kill_after is not None
            return time.monotonic() - start

        latest = min(save(step) for step in (0, 1))
        for step in range(2, 2 + KILLS):
            save(step, kill_after=moments.uniform(0, latest))
            found = complete_steps(api, folder)
            outcomes.append(step in found)
            assert found.keys() - {step} == {0, 1}
            for number, tree in found.items():
                assert_same_tree(tree, params(number))
            # How long a save takes depends on what else the machine does.
            latest *= 0.8 if step in found else 1.2
            if step in found:
                shutil.rmtree(folder / str(step))
        # What the killed ones have left behind is in nobody's way.
        save(step)
        assert_same_tree(complete_steps(api, folder)[step], params(step))
    finally:
        server.kill()
        server.communicate()
    # Otherwise the test would have tested nothing.
    assert outcomes.count(False) >= KILLS / 4


FAILING_SAVE = """
import os, resource, sys
import orbax.checkpoint as ocp
from orbax.checkpoint import v1
from df11_jax.orbax import DF11Save
from test_orbax_interrupted import params

api, path, obstacle = sys.argv[1:]

def save(step):
    if api == "v1":
        v1.save_checkpointables(f"{path}/{step}", {"params": params(step)})
    else:
        with ocp.CheckpointManager(path) as manager:
            manager.save(step, args=ocp.args.Composite(params=DF11Save(params(step))))

save(0)
if obstacle == "file size":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
elif obstacle == "read-only":
    os.chmod(path, 0o555)
    if os.geteuid() == 0:  # whom modes do not stop
        os.seteuid(65534)
try:
    save(1)
    if obstacle == "full":
        for step in range(2, 20):
            save(step)
except Exception as error:
    print(type(error).__name__, error, flush=True)
else:
    print("saved", flush=True)
os._exit(0)  # threads of Orbax still wait for directories that were never made
"""


def failing_save(api, path, obstacle):
    """The error, after which what was complete before is still there."""
    error = run_python(FAILING_SAVE, api, path, obstacle)
    assert not error.startswith("saved")
    path.chmod(0o755)
    found = complete_steps(api, path)
    assert 0 in found
    for step, tree in found.items():
        assert_same_tree(tree, params(step))
    return error, found


@pytest.mark.parametrize("api", ["v0", "v1"])
def test_no_more_space_in_a_file(api, tmp_path):
    error, found = failing_save(api, tmp_path, "file size")
    assert "File too large" in error
    assert found.keys() == {0}


@pytest.mark.parametrize("api", ["v0", "v1"])
def test_full_disk(api, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    try:
        error, _ = failing_save(api, disk, "full")
        assert "No space left on device" in error
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("api", ["v0", "v1"])
def test_read_only_directory(api):
    # Not in pytest's folders: they are their owner's alone, and root becomes another user.
    with tempfile.TemporaryDirectory() as folder:
        error, found = failing_save(api, pathlib.Path(folder), "read-only")
    assert "Permission denied" in error
    assert found.keys() == {0}
