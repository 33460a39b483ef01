import errno
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from df11_jax._files import atomic
from df11_jax._files.atomic import directory_beside, new_directory, new_file, remove_left
from df11_jax._files.journal import incomplete

JOURNAL = "df11_jax-incomplete.json"


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def killed_while(program):
    """Runs a program that says when it has begun, and kills it."""
    command = [sys.executable, "-P", "-c", program + "\nprint('begun', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        yield process
        process.send_signal(signal.SIGKILL)


def writing(path):
    return f"""
from pathlib import Path
from df11_jax._files.atomic import new_file
context = new_file(Path({str(path)!r}))
context.__enter__().write(b"half")
"""


def replacing(path):
    return f"""
from pathlib import Path
from df11_jax._files.atomic import new_directory
context = new_directory(Path({str(path)!r}))
(context.__enter__() / "half").touch()
"""


@pytest.mark.parametrize("last", [0, 1])
def test_of_two_writers_the_last_to_finish_counts(tmp_path, last):
    path = tmp_path / "x"
    contexts = [new_file(path), new_file(path)]
    for i, context in enumerate(contexts):
        context.__enter__().write(b"%d" % i * 1000)
    assert len(names(tmp_path)) == 2
    for i in (1 - last, last):
        contexts[i].__exit__(None, None, None)
        assert path.read_bytes() == b"%d" % i * 1000
    assert names(tmp_path) == ["x"]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), new_file(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_what_killed_writers_leave_is_removed_and_what_others_write_is_not(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    for _ in killed_while(writing(path)):
        (of_the_living,) = set(names(tmp_path)) - {"x"}
        with new_file(path) as file:
            file.write(b"new")
        assert names(tmp_path) == ["x", of_the_living]
    assert names(tmp_path) == ["x", of_the_living]
    assert path.read_bytes() == b"new"
    (tmp_path / "x.no token.partial").touch()
    with new_file(path) as file:
        file.write(b"newer")
    assert names(tmp_path) == ["x", "x.no token.partial"]
    assert path.read_bytes() == b"newer"


def test_links_are_not_followed(tmp_path, monkeypatch):
    (tmp_path / "victim").write_bytes(b"mine")
    tokens = iter(["00000000", "00000001"])
    monkeypatch.setattr(secrets, "token_hex", lambda n: next(tokens))
    os.symlink("victim", tmp_path / "x.00000000.partial")
    with new_file(tmp_path / "x") as file:
        file.write(b"new")
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert (tmp_path / "x").read_bytes() == b"new"

    (tmp_path / "directory").mkdir()
    os.symlink("../victim", tmp_path / "directory" / JOURNAL)
    with (
        pytest.raises(FileExistsError, match=f"{JOURNAL}: is a link"),
        incomplete(tmp_path / "directory", {"writes": "x"}),
    ):
        raise AssertionError("unreachable")
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_a_file_that_cannot_be_is_refused_before_it_is_written(tmp_path):
    (tmp_path / "directory").mkdir()
    for name, error in (("directory", IsADirectoryError), ("x" * 256, OSError)):
        with pytest.raises(error, match=name), new_file(tmp_path / name):
            raise AssertionError("unreachable")
    assert names(tmp_path) == ["directory"]
    with new_file(tmp_path / ("ä" * 127)) as file:  # as long as names can be
        file.write(b"new")


def test_content_is_durable_before_the_name_and_the_name_in_the_end(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)

        def call(*args, name=name, function=function):
            done.append(name)
            return function(*args)

        monkeypatch.setattr(os, name, call)
    with new_file(tmp_path / "x") as file:
        file.write(b"new")
    assert done == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_directory_that_takes_the_place_of_another(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *args, **kwargs: object())
    path = tmp_path / "x"
    path.mkdir()
    (path / "old").touch()
    os.symlink("x", tmp_path / "link")
    with pytest.raises(KeyboardInterrupt), new_directory(path) as new:
        (new / "new").touch()
        raise KeyboardInterrupt
    assert names(path) == ["old"]
    with new_directory(tmp_path / "link") as new:
        (new / "new").touch()
        assert names(path) == ["old"]
    assert names(path) == ["new"]
    assert names(tmp_path) == ["link", "x"]


def test_directories_of_killed_writers_are_removed_and_those_of_others_are_not(tmp_path):
    path = tmp_path / "x"
    path.mkdir()
    for _ in killed_while(replacing(path)):
        (of_the_living,) = set(names(tmp_path)) - {"x"}
        with new_directory(path) as new:
            (new / "new").touch()
        assert names(tmp_path) == ["x", of_the_living]
    with new_directory(path) as new:
        (new / "newer").touch()
    assert names(tmp_path) == ["x"]
    assert names(path) == ["newer"]
    for _ in killed_while(replacing(path)):
        pass
    shutil.rmtree(path)
    with incomplete(path, {}):
        (path / "newest").touch()
    assert names(tmp_path) == ["x"]


def test_what_an_interrupt_does_not_let_a_writer_remove_the_next_one_removes(tmp_path):
    path = tmp_path / "x"

    def interrupt(directory):
        while directory.stat().st_mtime_ns == 0:  # until the first file is removed
            pass
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        with directory_beside(path) as directory:
            for i in range(5000):
                (directory / str(i)).touch()
            os.utime(directory, ns=(0, 0))
            thread = threading.Thread(target=interrupt, args=(directory,))
            thread.start()
        thread.join()
    with new_file(path):
        pass
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_file_systems_without_locks(tmp_path, monkeypatch, number):
    """Writing works; what others left stays, since they may still be there."""

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "x.0123abcd.partial").touch()
    with new_file(tmp_path / "x") as file:
        file.write(b"new")
    with incomplete(tmp_path / "d", {}) as path:
        (path / "old").touch()
    with new_directory(tmp_path / "d") as path:
        (path / "new").touch()
    assert names(tmp_path) == ["d", "x", "x.0123abcd.partial"]
    assert names(tmp_path / "d") == ["new"]


def test_a_directory_that_is_complete_has_nothing_of_killed_writers(tmp_path):
    path = tmp_path / "d"
    with incomplete(path, {}):
        with open(path / "another name.0123abcd.partial", "w") as kept:
            fcntl.flock(kept, fcntl.LOCK_EX)
            (path / "x.0123abcd.partial").touch()
            (path / "x").touch()
    assert names(path) == ["x"]
    with open(path / "y.0123abcd.partial", "w") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        remove_left(path)
        assert names(path) == ["x", "y.0123abcd.partial"]
