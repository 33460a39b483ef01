"""Directories that are written file by file, also in several runs after interruptions."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from df11_jax._files.atomic import sync_directory
from df11_jax._files.directory import JOURNAL
from df11_jax._files.source import Source


@contextlib.contextmanager
def incomplete(path: Path, job: Mapping[str, str]) -> Iterator[None]:
    """A directory that is marked as incomplete until the block has succeeded.

    If the block fails or the process dies, the files that were written stay, so that the same job
    can go on from there. So files must be complete as soon as they have their names (`new_file`).
    If no file was written, nothing stays.

    Args:
        path: the path of the directory, which is new, empty, or left behind by the same job.
        job: a description that distinguishes this job from others, readable by people.

    Raises:
        FileExistsError: something else is there.
        BlockingIOError: another process is writing to it.
    """
    journal = path / JOURNAL
    is_new = not path.exists()
    if not is_new and not path.is_dir():
        raise FileExistsError(f"{path}: exists already, and is a file; expected a new directory")
    not_empty = f"{path}: exists already, and is not empty; nothing was changed"
    if not is_new and _is_begun(path) and not journal.exists():
        raise FileExistsError(not_empty)
    path.mkdir(parents=True, exist_ok=True)
    with open(journal, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{path}: another process is writing to it") from None
        # Before the lock was had, another process may have finished.
        if os.fstat(file.fileno()).st_nlink == 0:
            raise BlockingIOError(f"{path}: another process was writing to it")
        is_begun = _is_begun(path)
        file.seek(0)
        found, record = file.read(), json.dumps(job, indent=2) + "\n"
        if is_begun and not found:
            journal.unlink()
            raise FileExistsError(not_empty)
        if not is_begun:
            file.truncate(0)
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
            yield
            journal.unlink()
        except BaseException:
            if list(path.iterdir()) == [journal]:
                journal.unlink()
                if is_new:
                    path.rmdir()
            raise
    sync_directory(path)


def _is_begun(path: Path) -> bool:
    return any(entry.name != JOURNAL for entry in path.iterdir())


def fingerprint(source: Source) -> str:
    """A hash of a checkpoint's headers and of its files' sizes and times of change."""
    files = sorted(source.path.iterdir()) if source.path.is_dir() else [source.path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    text = json.dumps(
        [
            source.format,
            [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
            list(source.tensors.items()),
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _difference(found: str, job: Mapping[str, Any]) -> str:
    try:
        old = json.loads(found)
        return "; ".join(
            f"{key}: {old.get(key)}, now {value}"
            for key, value in job.items()
            if old.get(key) != value
        )
    except (ValueError, AttributeError):
        return f"{JOURNAL} cannot be read"
