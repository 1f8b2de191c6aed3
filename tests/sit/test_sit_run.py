"""Whole training runs on a handful of pictures: killed, resumed, in two processes, by commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sit_golden import random_sit
from sit_run import ENVIRONMENT, nursery, same, table, write
from tokenmodels._files import Busy, Checkpoints
from tokenmodels._processes import Processes
from tokenmodels.sit import Recipe, SiT, Training, throughput
from tokenmodels.sit.__main__ import main
from tokenmodels.sit.timing import _prepared

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="runs are forked")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """So small a network is faster without others, and its sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    table(folder)
    return folder


def ended(folder: Path, out: str, options: dict[str, Any], *how: int) -> tuple[dict, dict]:
    """Trains in the nursery: what it tells, and the last checkpoint, without its folder's name."""
    options["run"]["out"] = str(folder / out)
    config = write(folder / f"{out}.json", options)
    done = subprocess.run(
        nursery(config, *how), env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    step, state = Checkpoints(folder / out / "checkpoints").latest()
    state["marks"]["run"].pop("out")
    return json.loads(done.stdout), state | {"step": step}


@pytest.mark.slow
def test_killed_at_twenty_random_moments(folder: Path) -> None:
    """Weights, average, optimiser and best result are those of a run that nobody killed."""
    options = table(folder, run={"save_every": 1}, optim={"epochs": 24, "cooldown": 1})
    _, want = ended(folder, "whole", options, 1, 0, 0)
    told, got = ended(folder, "killed", options, 1, 20, 7)
    assert len(told["steps_at_kills"]) == 20 and got["step"] == 25 * 6
    assert told["steps_at_kills"] == sorted(told["steps_at_kills"])
    assert len(set(told["steps_at_kills"])) > 10
    assert same(got, want)
    for name in ("last", "best", "average"):
        weights = [SiT.from_pretrained(folder / out / name) for out in ("whole", "killed")]
        assert same(*(one.state_dict() for one in weights))
        assert weights[0].training_parts is None
    logs = [(folder / out / "log.jsonl").read_text() for out in ("whole", "killed")]
    steps = [[json.loads(line)["step"] for line in log.splitlines()] for log in logs]
    assert steps[0] == steps[1], "a line is twice in the log, or missing"


@pytest.mark.slow
def test_two_processes(folder: Path) -> None:
    """By torchrun, and killed in between: the same bits; each process sees other images."""
    run = {"save_every": 1, "precision": "bf16"}
    options = table(folder, run=run, optim={"batch_size": 3})
    told, got = ended(folder, "two-killed", options, 2, 2, 3)
    assert len(told["steps_at_kills"]) == 2 and got["step"] == 4 * 4
    assert got["marks"]["processes"] == 2
    options["run"]["out"] = str(folder / "two")
    config = write(folder / "two.json", options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tokenmodels.sit", "train", "--config", str(config)]
    threads = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=threads, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps are done") == 1, "not one process speaks"
    _, want = Checkpoints(folder / "two" / "checkpoints").latest()
    want["marks"]["run"].pop("out")
    assert same(got, want | {"step": 16})


def _trained(options: dict[str, Any]) -> Training:
    training = Training(Recipe.of(options))
    training.run()
    training.lock.release()
    return training


def test_goes_on_behind_a_damaged_checkpoint(folder: Path) -> None:
    """Cut short as by a full disk, or with a flipped bit: the one before is taken."""
    options = table(folder, run={"save_every": 1, "out": str(folder / "damaged")})
    want = _trained(options).student.state_dict()
    for damage in (lambda x: x[:-100], lambda x: x[:2000] + bytes([x[2000] ^ 1]) + x[2001:]):
        newest = max((folder / "damaged" / "checkpoints").glob("*.pt"))
        newest.write_bytes(damage(newest.read_bytes()))
        with pytest.warns(UserWarning, match=f"{newest.name} is damaged: an earlier checkpoint"):
            training = _trained(options)
        assert same(training.student.state_dict(), want)
    for path in (folder / "damaged" / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match="Checkpoints: folder: allowed one good file or none, got"),
    ):
        Training(Recipe.of(options))


def test_goes_on_with_scaled_gradients_and_both_teachers(folder: Path) -> None:
    """In float16, with images read by other processes, a distillation token, recomputed blocks."""
    options = table(
        folder,
        model={"dist_token": True},
        optim={"epochs": 2, "cooldown": 0},
        distil={"cnn_teacher": str(folder / "teacher")},
        data={"workers": 2, "val": ""},
        run={"precision": "fp16", "recompute": True, "save_every": 1},
    )
    states = []
    for out, stops in (("half", ()), ("half-stopped", (1, 8))):
        options["run"]["out"] = str(folder / out)
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                Training(Recipe.of(options)).run(on_step=lambda run, stop=stop: _stop(run, stop))
        states.append(_trained(options).state())
        states[-1]["marks"]["run"].pop("out")
    assert same(*states)
    assert states[0]["scaler"]["scale"] > 1 and states[0]["scaler"]["_growth_tracker"] > 0


def _stop(run: Training, step: int) -> None:
    if run.done == step:
        raise KeyboardInterrupt


def test_learns_and_reports(folder: Path) -> None:
    """Colours are told apart; the log and the results agree; what is written is what was best."""
    options = table(
        folder,
        model={"drop_path": 0},
        optim={"epochs": 30, "cooldown": 0, "lr": 0.3, "batch_size": 12},
        distil={"teacher": ""},
        augment={"mix": 0, "smoothing": 0, "repeats": 1},
        run={"out": str(folder / "learns"), "log_every": 6, "eval_every": 12},
    )
    training = _trained(options)
    lines = [
        json.loads(line) for line in (folder / "learns" / "log.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 10 and losses[-1] < 0.75 * losses[0]
    assert [step for step, _, _ in training.results] == [24, 24, 48, 48, 60, 60]
    assert [line["student_top1"] for line in lines if "student_top1" in line] == [
        got.top1 for _, name, got in training.results if name == "student"
    ]
    best = max(got.top1 for _, _, got in training.results)
    assert training.best == best > 60
    rates = [line["lr"] for line in lines if "lr" in line]
    peak = 0.3 * 12 / 512
    assert 0.9 * peak < rates[0] < peak and rates == sorted(rates, reverse=True)


def test_from_the_shell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options on the command line go before the file's; what was trained is evaluated and timed."""
    config = write(folder / "shell.json", table(folder))
    out = folder / "shell"
    given = ["--run.out", str(out), "--optim.epochs", "1", "--optim.cooldown", "0"]
    train = ["train", "--config", str(config), *given]
    assert main([*train, "--show"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["optim"]["epochs"] == 1 and shown["run"]["out"] == str(out)
    assert main(train) == 0
    said = capsys.readouterr().out
    assert "from step 0 (epoch 0) to 6" in said and "6 steps are done" in said
    assert main(train) == 0
    assert capsys.readouterr().out == f"6 steps are done; the weights are in {out / 'last'}\n"
    measured = ["eval", "--weights", str(out / "last"), "--data", str(folder / "val")]
    assert main([*measured, "--workers", "0", "--device", "cpu"]) == 0
    told = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    top1 = next(line["student_top1"] for line in told if "student_top1" in line)
    assert capsys.readouterr().out.startswith(f"6 images: top-1 {top1:.3f} %")
    timed = ["throughput", "--weights", str(out / "last"), "--dense", "--batch-size", "2"]
    assert main([*timed, "--warm-up", "0", "--seconds", "0.05", "--device", "cpu"]) == 0
    assert "times as fast, with" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["trace", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_timed_gives_the_logits(mode: str, precision: str) -> None:
    """As prepared for timing, folded: those of the model, up to the rounding of its precision."""
    model, images = random_sit(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode(), Processes().autocast(precision):
        want, folded = model(images), model.fold_for_inference()
        got = _prepared(folded, images, mode)(images)
        if mode == "eager":
            assert torch.equal(got, folded(images))
        else:  # of torch's own operators, whose sums may differ from oneDNN's
            torch.testing.assert_close(got, folded(images))
    bound = {"fp32": 1e-5, "bf16": 2**-6}[precision] * want.abs().max().item()
    torch.testing.assert_close(got.float(), want.float(), atol=bound, rtol=0)
    timed = throughput(model, batch_size=2, precision=precision, mode=mode, warm_up=0, seconds=0)
    assert timed.batches == 1
    assert timed.images_per_second == pytest.approx(2e3 / timed.milliseconds)


def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in one line, with the option's name, before anything is trained."""
    options = table(folder, run={"out": str(folder / "refused")})
    config = write(folder / "refused.json", options)
    (folder / "empty").mkdir()
    broken = folder / "broken.toml"
    broken.write_text("[optim\n")

    def refused(words: str, *arguments: object) -> None:
        given = [str(one) for one in arguments]
        file = [] if "--config" in given else ["--config", str(config)]
        assert main(["train", *file, *given]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error

    refused("config: file: allowed a file that exists", "--config", folder / "none.toml")
    refused("config: file: allowed whole toml, got", "--config", broken)
    refused("config: file: allowed one that ends in .toml or .json", "--config", __file__)
    refused("config: optim.lr: allowed float, got 'fast'", "--optim.lr", "fast")
    refused("config: run.precision: allowed bf16 or fp16 or fp32", "--run.precision", "fp8")
    refused("SiTConfig: stages: allowed a sum of depth=3, got (1, 1)", "--model.stages", "[1, 1]")
    refused("config: data.train: allowed a folder of a folder per class", "--data.train", "")
    refused("data: folder: allowed one that exists, got", "--data.train", folder / "none")
    refused("data: folder: allowed class folders with .jpg", "--data.val", folder / "empty")
    refused("data: images: allowed at least one batch of 25", "--optim.batch_size", "25")
    refused("data: classes: allowed 4 class folders, as model", "--model.num_classes", "4")
    refused("SiT.from_pretrained: name: allowed a folder that", "--distil.teacher", folder / "none")
    refused("SiT.transplant: teacher: allowed one with embed_dim=32", "--model.embed_dim", "32")
    refused("only model.dist_token", "--model.dist_token", "true")
    main(["train", "--config", str(config), "--optim.epochs", "1"])
    capsys.readouterr()
    words = "run.out: allowed the folder of the same run, or another one for a new run, got "
    refused(f"{words}{folder / 'refused'} with optim.epochs 1, now 3")


def test_one_run_at_a_time(folder: Path) -> None:
    options = table(folder, run={"out": str(folder / "busy")})
    command = [sys.executable, "-c", HOLD, str(folder / "busy")]
    with subprocess.Popen(command, stdin=-1, stdout=-1, env=ENVIRONMENT) as other:
        assert other.stdout.readline()
        with pytest.raises(Busy, match="Lock: folder: allowed one process at a time, got"):
            Training(Recipe.of(options))
        other.kill()
    Training(Recipe.of(options)).lock.release()


HOLD = """
import sys; from pathlib import Path; from tokenmodels._files import Lock
Path(sys.argv[1]).mkdir(); lock = Lock(sys.argv[1]); print("held", flush=True); input()
"""
