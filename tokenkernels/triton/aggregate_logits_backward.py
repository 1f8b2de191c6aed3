"""aggregate_logits_backward in Triton: one launch by blocks of tokens, whose logits and values are
read once where a block holds all slots.
"""

import torch
from torch import Tensor

from tokenkernels.triton._aggregate_backward import Inputs


def aggregate_logits_backward(
    gradient: Tensor,
    logits: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tokens: Tensor,
    lse: Tensor,
    need_logits: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and values; empty where not needed."""
    logits_grad, value_grad = (
        torch.empty(x.shape if needed else (0,), dtype=value.dtype, device=value.device)
        for x, needed in ((logits, need_logits), (value, need_value))
    )
    inputs = Inputs(gradient, None, logits, value, None, mask, None, 1.0, tokens, lse, None)
    inputs.by_token(
        logits_grad if need_logits else None, value_grad if need_value else None, None, None
    )
    return logits_grad, value_grad
