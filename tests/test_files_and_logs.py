"""Files that are whole whatever happens, checkpoints, the log of a run, options in tables."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenmodels import _processes
from tokenmodels._files import Checkpoints, replace_file
from tokenmodels._log import Log
from tokenmodels._processes import Processes


def test_the_order_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content to the disk, then the name, then the folder that has the name."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flush(file: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{file}") else "content")
        fsync(file)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("name"), replace(a, b)))
    Checkpoints(tmp_path).save(1, {})
    replace_file(tmp_path / "a", lambda path: path.write_text("a"))
    assert calls == ["content", "name", "folder"] * 2


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    """Those that are good: a damaged one is passed over; what was not finished is removed."""
    checkpoints = Checkpoints(tmp_path / "new" / "folder", keep=3)
    assert checkpoints.latest() is None and checkpoints.steps() == []
    for step in (1, 2, 10, 100):
        checkpoints.save(step, {"x": torch.tensor(step)})
    assert checkpoints.steps() == [2, 10, 100]
    assert checkpoints.latest() == (100, {"x": torch.tensor(100)})
    folder = checkpoints.folder
    (newest,) = folder.glob("step-*100-*")
    newest.write_bytes(newest.read_bytes()[:-1])
    left = folder / ".step-000000101.4242.unfinished"
    other = folder / "notes.txt"
    left.write_text("half"), other.write_text("mine")
    checkpoints.remove_unfinished()
    assert not left.exists() and other.exists()
    with pytest.warns(UserWarning, match="step-000000100-.* is damaged"):
        assert checkpoints.latest() == (10, {"x": torch.tensor(10)})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writer is forked")
@pytest.mark.parametrize(
    ("function", "call", "step"),
    [
        *(("torch.save", 0, 1), ("os.fsync", 0, 1), ("os.replace", 0, 1), ("os.fsync", 1, 2)),
        ("pathlib.Path.unlink", 0, 2),
    ],
)
def test_killed_in_the_middle_of_writing(
    function: str, call: int, step: int, tmp_path: Path
) -> None:
    """Wherever it is killed, the checkpoint before or this one is found, whole."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"x": torch.ones(1000)})
    child = os.fork()
    if not child:
        try:
            _kill_at(function, call)
            checkpoints.save(2, {"x": torch.ones(1000)})
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    found = checkpoints.latest()
    assert found is not None and found[0] == step and torch.equal(found[1]["x"], torch.ones(1000))
    checkpoints.remove_unfinished()
    assert not list(tmp_path.glob(".*"))
    checkpoints.save(3, {})
    assert checkpoints.steps() == [3]


def _kill_at(function: str, call: int) -> None:
    """The process kills itself in this call of a function; of `torch.save`, half done."""
    owner, _, name = function.rpartition(".")
    where = {"torch": torch, "os": os, "pathlib.Path": Path}[owner]
    original, calls = getattr(where, name), iter(range(100))

    def killed(*arguments: Any, **more: Any) -> Any:
        if next(calls) < call:
            return original(*arguments, **more)
        if name == "save":
            original(*arguments)
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(where, name, killed)


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {})
    with pytest.raises(Exception, match="pickle"):
        checkpoints.save(2, {"x": lambda: None})
    assert checkpoints.steps() == [1] and len(list(tmp_path.iterdir())) == 1


def test_lines_of_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of steps that are run again go, and one that was cut short."""
    log = Log(tmp_path, total=9, done=0)
    for step in (3, 6, 9):
        log.tell(step, {"loss": step / 2})
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    log = Log(tmp_path, total=9, done=6)
    log.tell(9, {"loss": 1.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 3, "loss": 1.5}, {"step": 6, "loss": 3.0}, {"step": 9, "loss": 1.0}]
    assert capsys.readouterr().out.splitlines()[-1] == "step 9 of 9: loss 1"
    Log(tmp_path / "nowhere", total=1, done=0, speaks=False).tell(1, {"loss": 0.0})


def test_bar_and_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal a bar, with lines above it; TensorBoard where it is installed."""
    told: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            told.append((Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def close(self) -> None:
            told.append("closed")

    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log = Log(tmp_path, total=8, done=2)
    log.advance(4)
    log.tell(4, {"loss": 0.5, "lr": 1e-3})
    log.advance(8)
    log.close()
    assert told == [("tensorboard", 2), ("loss", 0.5, 4), ("lr", 1e-3, 4), "closed"]
    shown = capsys.readouterr().out
    assert "step 4 of 8: loss 0.5  lr 0.001" in shown and "8/8" in shown and "100%" in shown


def test_one_process() -> None:
    alone = _processes.start("cpu")
    assert alone == Processes() and alone.leads and alone.same(3) and alone.sum([1, 2]) == [1, 2]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"config: run.device: allowed cpu, or one of 0 GPUs"):
            _processes.start("cuda")
