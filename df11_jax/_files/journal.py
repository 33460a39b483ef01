"""Directories that are written file by file, also in several runs after interruptions."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from df11_jax._brief import listed
from df11_jax._files.atomic import lock, remove_left, sync_directory
from df11_jax._files.directory import JOURNAL
from df11_jax._files.source import changed_files
from df11_jax._files.untrusted_json import MAX_BYTES

# What distinguishes a job from others. A mapping is that of files to what identifies them.
Job = Mapping[str, str | Mapping[str, str]]


@contextlib.contextmanager
def incomplete(path: Path, job: Job) -> Iterator[Path]:
    """A directory that is marked as incomplete until the block has succeeded.

    If the block fails or the process dies, the files that were written stay, so that the same job
    can go on from there. So files must be complete as soon as they have their names (`new_file`).
    If no file was written, nothing stays.

    Args:
        path: the path of the directory, which is new, empty, or left behind by the same job.
        job: a description that distinguishes this job from others, readable by people.

    Yields:
        The path.

    Raises:
        FileExistsError: something else is there.
        BlockingIOError: another process is writing to it.
    """
    journal = path / JOURNAL
    is_new = not os.path.lexists(path)
    if not is_new and not path.is_dir():
        what = "a file" if path.exists() else "a link to nothing"
        raise FileExistsError(f"{path}: exists already, and is {what}; expected a new directory")
    not_empty = f"{path}: exists already, and is not empty; nothing was changed"
    if not is_new and _is_begun(path) and not os.path.lexists(journal):
        raise FileExistsError(not_empty)
    path.mkdir(parents=True, exist_ok=True)
    remove_left(path.absolute().parent, path.absolute().name)
    with _open(journal) as file:
        if lock(file.fileno()) is False:
            raise BlockingIOError(f"{path}: another process is writing to it")
        # Before the lock was had, another process may have finished.
        if os.fstat(file.fileno()).st_nlink == 0:
            raise BlockingIOError(f"{path}: another process was writing to it")
        is_begun = _is_begun(path)
        found, record = file.read(MAX_BYTES), (json.dumps(job, indent=2) + "\n").encode()
        if is_begun and not found:
            journal.unlink()
            raise FileExistsError(not_empty)
        if not is_begun:
            file.seek(0)
            file.truncate()
            file.write(record)
            file.flush()
            os.fsync(file.fileno())
        elif found != record:
            raise FileExistsError(
                f"{path}: is what an interrupted run left behind, but of another job or from "
                f"files that have changed since ({_difference(found, job)}). Nothing was changed; "
                "delete the directory to start anew"
            )
        try:
            yield path
            remove_left(path)
            journal.unlink()
        except BaseException:
            if list(path.iterdir()) == [journal]:
                journal.unlink()
                if is_new:
                    path.rmdir()
            raise
    sync_directory(path)
    sync_directory(path.absolute().parent)


def _open(journal: Path) -> BinaryIO:
    """Opens a journal, which is created if it is not there."""
    try:
        descriptor = os.open(
            journal,
            os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
            0o666,
        )
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise FileExistsError(
            f"{journal}: is a link, which no run of df11_jax has made; nothing was changed"
        ) from None
    return open(descriptor, "r+b")


def _is_begun(path: Path) -> bool:
    return any(entry.name != JOURNAL for entry in path.iterdir())


def _difference(found: bytes, job: Mapping[str, Any]) -> str:
    try:
        old = json.loads(found)
        return "; ".join(
            _describe_change(key, old.get(key), value)
            for key, value in job.items()
            if old.get(key) != value
        )
    except (ValueError, AttributeError):
        return f"{JOURNAL} cannot be read"


def _describe_change(key: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, Mapping):
        changed = changed_files(old, new)
        return f"{key} that changed: {listed(changed)}"
    return f"{key}: {old}, now {new}"
