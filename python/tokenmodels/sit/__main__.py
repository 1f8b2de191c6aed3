"""`python -m tokenmodels.sit`: `train` by a recipe, `eval` on labelled images, `throughput`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

import torch

from tokenmodels import _processes
from tokenmodels._files import Busy
from tokenmodels._options import add_arguments, given, merged, read_table
from tokenmodels.sit.config import VARIANTS, SiTConfig
from tokenmodels.sit.evaluate import accuracy, evaluation_loader
from tokenmodels.sit.model import SiT
from tokenmodels.sit.recipe import Recipe
from tokenmodels.sit.teachers import open_sit
from tokenmodels.sit.timing import MODES, throughput
from tokenmodels.sit.train import Training

PRECISIONS = ("fp32", "bf16", "fp16")
REFUSALS = (ValueError, TypeError, ImportError, FileNotFoundError, Busy)
"""What says in words that something given does not fit."""


def main(arguments: list[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    try:
        return int(chosen.command(chosen))
    finally:
        _processes.stop()


def train(chosen: argparse.Namespace) -> int:
    """Trains to the end, beginning at the newest checkpoint of `run.out` if there is one."""
    try:
        table = read_table(chosen.config) if chosen.config else {}
        if chosen.variant:
            table = merged(table, {"model": {"variant": chosen.variant}})
        recipe = Recipe.of(merged(table, given(chosen, Recipe())))
        if chosen.show:
            print(json.dumps(recipe.table(), indent=2))
            return 0
        training = Training(recipe, _processes.start(recipe.run.device))
    except REFUSALS as error:
        return _refused(error)
    training.run()
    return 0


def evaluate(chosen: argparse.Namespace) -> int:
    """Prints top-1 and top-5 accuracy by the official preprocessing."""
    try:
        at = _processes.start(chosen.device)
        model = _resized(open_sit(chosen.weights, variant=chosen.variant), chosen.image_size)
        batches = evaluation_loader(
            chosen.data,
            model.config,
            at,
            batch_size=chosen.batch_size,
            workers=chosen.workers,
            crop=chosen.crop,
        )
    except REFUSALS as error:
        return _refused(error)
    folded = model.fold_for_inference().to(at.device)
    got = accuracy(folded, batches, processes=at, precision=chosen.precision)
    if at.leads:
        percent = f"top-1 {got.top1:.3f} %, top-5 {got.top5:.3f} %"
        print(f"{got.images} images: {percent}, loss {got.loss:.4f}")
    return 0


def speed(chosen: argparse.Namespace) -> int:
    """Prints images per second of the model, and of its dense teacher if that is asked for."""
    device = (
        ("cpu", "cuda")[torch.cuda.is_available()] if chosen.device == "auto" else chosen.device
    )
    cuda = device == "cuda"
    if not cuda:
        torch.set_num_threads(chosen.threads)
    batch_size = chosen.batch_size or (1024 if cuda else 16)
    precision = chosen.precision or ("fp16" if cuda else "fp32")
    try:
        models = [_resized(_timed_model(chosen), chosen.image_size)]
    except REFUSALS as error:
        return _refused(error)
    if chosen.dense:
        models.append(SiT(replace(models[0].config, dense=True)).eval())
    threads = "" if cuda else f", {torch.get_num_threads()} threads"
    print(f"{device}{threads}, {precision}, batch {batch_size}, {chosen.mode}")
    print(f"{'':<8}{'GMAC':>8}{'ms':>10}{'images/s':>12}")
    rates = []
    for name, model in zip(("slimmed", "dense"), models, strict=False):
        got = throughput(
            model,
            batch_size=batch_size,
            precision=precision,
            mode=chosen.mode,
            warm_up=chosen.warm_up,
            seconds=chosen.seconds,
            device=device,
        )
        rates.append(got.images_per_second)
        figures = f"{got.milliseconds:>10.1f}{got.images_per_second:>12.1f}"
        print(f"{name:<8}{model.config.macs() / 1e9:>8.3f}{figures}", flush=True)
    if len(models) == 2:
        share = models[1].config.macs() / models[0].config.macs()
        print(f"{rates[0] / rates[1]:.2f} times as fast, with {share:.2f} times fewer operations")
    return 0


def _timed_model(chosen: argparse.Namespace) -> SiT:
    if chosen.weights:
        return open_sit(chosen.weights, variant=chosen.variant)
    return SiT(SiTConfig.variant(chosen.variant or "sit_small")).eval()


def _resized(model: SiT, image_size: int | None) -> SiT:
    return model if image_size is None else model.resized(image_size)


def _refused(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tokenmodels.sit", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{train,eval,throughput}")
    _add_train(commands.add_parser("train", help="train, or go on", description=train.__doc__))
    _add_eval(commands.add_parser("eval", help="accuracy", description=evaluate.__doc__))
    timed = commands.add_parser("throughput", help="images per second", description=speed.__doc__)
    _add_throughput(timed)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=train)
    parser.add_argument("--config", help="a .toml or .json file with sections as the options below")
    parser.add_argument("--variant", choices=VARIANTS, help="model.variant of such a file")
    parser.add_argument("--show", action="store_true", help="print the whole recipe, and end")
    add_arguments(parser, Recipe())


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=evaluate)
    _add_model(parser, needed=True)
    parser.add_argument(
        "--data", required=True, help="a folder per class in a folder, or tar shards"
    )
    parser.add_argument("--batch-size", type=_count, default=192)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument(
        "--crop", type=float, default=224 / 256, help="share of the short side kept"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=speed)
    _add_model(parser, needed=False)
    parser.add_argument("--dense", action="store_true", help="time the dense network too")
    parser.add_argument("--batch-size", type=_count, help="16, on a GPU 1024")
    parser.add_argument("--precision", choices=PRECISIONS, help="fp32, on a GPU fp16")
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    parser.add_argument("--threads", type=_count, default=1, help="on a CPU")
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=60.0)


def _add_model(parser: argparse.ArgumentParser, *, needed: bool) -> None:
    told = "a folder of save_pretrained, a hub id, or a file of the official code"
    parser.add_argument("--weights", required=needed, help=told)
    parser.add_argument("--variant", choices=VARIANTS, help="the released network, for a file")
    parser.add_argument("--image-size", type=_count, help="if not the one it is made for")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"allowed a number above 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
