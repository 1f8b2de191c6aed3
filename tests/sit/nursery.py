"""Forks training runs from a process that has imported everything, and kills them at any moment.

`nursery.py CONFIG PROCESSES KILLS SEED` trains by a recipe in so many processes, kills them
together with SIGKILL that often, each time begins again, and then lets them end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import PIL.Image  # noqa: F401
import safetensors.torch  # noqa: F401
import torch
from tokenmodels import _processes
from tokenmodels._options import read_table
from tokenmodels.sit import Recipe, Training


def main() -> None:
    config, processes, kills, seed = sys.argv[1], *(int(one) for one in sys.argv[2:])
    drawn, folder = random.Random(seed), Path(read_table(config)["run"]["out"]) / "checkpoints"
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports more than all else
    moments, unfinished, pace = [], 0, 0.02
    for kill in range(kills):
        children = _born(config, processes)
        if kill % 4:  # else while it starts, or goes on from a checkpoint
            pace = _await_steps(folder, pace)
        if kill % 4 == 3:
            while not _is_writing(folder):
                pass
        else:
            time.sleep(drawn.uniform(0, 4 * pace))
        moments.append(_newest(folder))
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), "it had ended before"
        unfinished += _is_writing(folder)
    for child in _born(config, processes):
        _, status = os.waitpid(child, 0)
        assert status == 0, f"ended with {status}"
    print(json.dumps({"steps_at_kills": moments, "while_writing": unfinished}))


def _born(config: str, processes: int) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_fork(config, rank, processes, port) for rank in range(processes)]


def _fork(config: str, rank: int, processes: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    if processes > 1:  # as torchrun says it
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "nursery"})
    code = 1
    try:
        os.dup2(2, 1)
        torch.set_num_threads(1)
        recipe = Recipe.of(read_table(config))
        Training(recipe, _processes.start(recipe.run.device)).run()
        _processes.stop()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def _newest(folder: Path) -> int:
    names = [path.name for path in folder.glob("step-*.pt")]
    return max((int(name.split("-")[1]) for name in names), default=0)


def _is_writing(folder: Path) -> bool:
    return any(folder.glob(".*.unfinished"))


def _await_steps(folder: Path, pace: float) -> float:
    """Returns when two more checkpoints are there: the time between them, or the last known."""
    start, first = _newest(folder), 0.0
    while True:
        new = _newest(folder) - start
        if new >= 1 and not first:
            first = time.perf_counter()
        if new >= 2:
            return (time.perf_counter() - first) or pace
        time.sleep(0.001)


main()
