"""Files that are whole at any moment: written beside, flushed to disk, renamed; and folders of
checkpoints made of them.
"""

from __future__ import annotations

import os
import re
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokenmodels._refuse import refusal

_UNFINISHED = re.compile(r"\..+\.\d+\.unfinished")
_CHECKPOINT = re.compile(r"step-(\d+)-([0-9a-f]{8})\.pt")


def replace_file(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside `path` and, when it lies on the disk, renames it to `path`.

    Whoever reads `path` finds the old file or the new one, whole, whenever this is interrupted.

    Args:
        path: the file; its folder is there.
        write: gets the path that it has to write.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(Path(folder) / "a.txt", lambda path: path.write_text("whole"))
        ...     (Path(folder) / "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    unfinished = _beside(path)
    try:
        write(unfinished)
        _put(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.unfinished")


def _put(unfinished: Path, path: Path) -> None:
    """Renames once the content is on the disk; returns once the name is."""
    with open(unfinished, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    if os.name == "posix":  # elsewhere folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Checkpoints:
    """A folder of checkpoints of one run, the last few of which are kept.

    A file is named after its step and the checksum of its content: one that is damaged, by a disk
    or a copy cut short, is told from a good one, and passed over.

    Args:
        folder: is made.
        keep: how many are left in it; at least 1.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = Checkpoints(folder, keep=2)
        ...     for step in range(5):
        ...         checkpoints.save(step, {"weights": torch.full((2,), step)})
        ...     checkpoints.latest(), len(list(Path(folder).iterdir()))
        ((4, {'weights': tensor([4, 4])}), 2)
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = max(keep, 1)
        self.folder.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        """The steps of which there is a file, rising."""
        return [step for step, _ in self._files()]

    def save(self, step: int, state: Any) -> None:
        """Writes what `torch.load(…, weights_only=True)` can read: tensors, numbers, strings, and
        lists and dicts of such. Then older files go, beyond those that are kept, and damaged ones
        of this step or later, which were passed over.
        """
        unfinished = _beside(self.folder / f"step-{step:09d}")
        try:
            torch.save(state, unfinished)
            written = self.folder / f"step-{step:09d}-{_checksum(unfinished):08x}.pt"
            _put(unfinished, written)
        finally:
            unfinished.unlink(missing_ok=True)
        for other, path in self._files():
            if other >= step and path != written:
                path.unlink(missing_ok=True)
        for _, path in self._files()[: -self.keep]:
            path.unlink(missing_ok=True)

    def latest(self) -> tuple[int, Any] | None:
        """Step and state of the newest file that is good, on the CPU; None in an empty folder.

        Warns of each file that is damaged.

        Raises:
            ValueError: there are files, and all are damaged.
        """
        files = self._files()
        for step, path in reversed(files):
            told = _CHECKPOINT.fullmatch(path.name)
            if told and int(told[2], 16) == _checksum(path):
                return step, torch.load(path, map_location="cpu", weights_only=True)
            warnings.warn(f"{path} is damaged: an earlier checkpoint is taken", stacklevel=2)
        if files:
            got = f"{len(files)} damaged in {self.folder}"
            raise ValueError(refusal("Checkpoints", "folder", "one good file or none", got))
        return None

    def remove_unfinished(self) -> None:
        """Removes what killed processes left behind; for the one process that writes here."""
        for path in self.folder.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _files(self) -> list[tuple[int, Path]]:
        found = ((_CHECKPOINT.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(name[1]), path) for name, path in found if name)


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


class Busy(RuntimeError):
    """Another process is at work where one alone may be."""


class Lock:
    """A folder's mark that a process writes in it, which goes with the process however it ends.

    Raises:
        Busy: another process that lives holds it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.file = open(Path(folder) / "lock", "a")  # noqa: SIM115, held as long as the lock
        if os.name != "posix":
            return
        import fcntl

        try:
            # Unlike flock's, such a lock is not handed down to loaders, which may outlive us.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            got = f"{folder}, in which another process writes"
            raise Busy(refusal("Lock", "folder", "one process at a time", got)) from error

    def release(self) -> None:
        """Leaves the folder to others."""
        self.file.close()
