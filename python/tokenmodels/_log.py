"""What a run tells while it goes on: a progress bar or lines, a file of JSON lines, TensorBoard."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenmodels._files import replace_file


class Log:
    """Figures by step; `log.jsonl` in the folder holds every line, and none twice after a resume.

    The bar is that of the package rich, where it is installed and a terminal looks on; TensorBoard
    is written where it is installed.

    Args:
        folder: where the files go.
        total: steps of the whole run.
        done: steps that lie behind; lines of later ones, from a run that was killed, are removed.
        speaks: whether this process writes and shows anything.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = Log(folder, total=10, done=0)
        ...     log.tell(5, {"loss": 0.25})
        ...     log.close()
        step 5 of 10: loss 0.25
    """

    def __init__(self, folder: str | Path, *, total: int, done: int, speaks: bool = True) -> None:
        self.total, self.speaks = total, speaks
        self._bar, self._board = None, None
        if not speaks:
            return
        path = Path(folder) / "log.jsonl"
        _cut(path, done)
        self._file = open(path, "a")  # noqa: SIM115, closed with the log
        self._bar, self._task = _bar(total, done)
        self._board = _board(Path(folder) / "tensorboard", done)

    def advance(self, done: int) -> None:
        """So many steps lie behind."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def tell(self, step: int, values: dict[str, float]) -> None:
        """Figures of a step."""
        if not self.speaks:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"step {step} of {self.total}: {shown}")

    def say(self, text: str) -> None:
        """A line for whoever looks on."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self.speaks:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar, closes the files."""
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()
        if self.speaks:
            self._file.close()


def _cut(path: Path, done: int) -> None:
    """Removes lines of steps beyond `done`, and one that was not finished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    replace_file(path, lambda unfinished: unfinished.write_text("".join(kept)))


def _bar(total: int, done: int) -> tuple[Any, Any]:
    if not sys.stdout.isatty():
        return None, None
    try:
        from rich import progress
    except ImportError:
        return None, None
    columns = (
        *(progress.MofNCompleteColumn(), progress.BarColumn(None)),
        *(progress.TaskProgressColumn(), progress.TimeElapsedColumn()),
        progress.TimeRemainingColumn(),
    )
    bar = progress.Progress(*columns)
    task = bar.add_task("training", total=total, completed=done)
    bar.start()
    return bar, task


def _board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=done)
