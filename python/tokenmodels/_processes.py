"""The processes of a run: one, or those that `torchrun` started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from tokenmodels._refuse import refusal


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, and what it computes on.

    Example:
        >>> Processes().leads
        True
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def autocast(self, precision: str) -> torch.autocast:
        """Computes inside in "bf16" or "fp16" where that is safe, or with "fp32" in nothing else
        than the weights' dtype.
        """
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=precision != "fp32")

    def wait(self) -> None:
        """Returns when every process is here."""
        if self.world > 1:
            dist.barrier()

    def share_buffers(self, *modules: nn.Module) -> None:
        """Gives all processes the first one's buffers, such as running statistics."""
        if self.world > 1:
            for module in modules:
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=0)

    def same(self, value: int) -> bool:
        """Whether all processes have the same whole number."""
        if self.world == 1:
            return True
        found = torch.tensor([value, -value], device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found[0].item() == -found[1].item()


def start(device: str = "auto") -> Processes:
    """Joins the processes that `torchrun` started, or is the only one.

    Args:
        device: "cpu", "cuda", or "auto": CUDA where there is one. Processes of one machine take a
            GPU each.

    Raises:
        ValueError: CUDA is asked for, and there are not as many GPUs as processes here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = ("cuda" if gpus else "cpu") if device == "auto" else device
    launched = dist.is_available() and dist.is_torchelastic_launched()
    local = dist.get_node_local_rank(fallback_rank=0) if launched else 0
    if kind == "cuda" and local >= gpus:
        raise ValueError(
            refusal("config", "run.device", f"cpu, or one of {gpus} GPUs", f"cuda:{local}")
        )
    place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    if not launched:
        return Processes(device=place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), place)


def stop() -> None:
    """Leaves the other processes; nothing where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
