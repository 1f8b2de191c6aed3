"""What SiT has for training alone: modules that recover the full number of patch tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tokenmodels._blocks import MLP
from tokenmodels.sit.config import SiTConfig


class RecoverTokens(nn.Module):
    """The reverse token slimming module: K patch tokens in, R out, to be compared with a teacher's.

    An MLP over the tokens of each channel, then a residual MLP over the channels of each token. It
    is bound to K and R, and what it gives never goes back into the network.

    Source: Zong et al., ECCV 2022, section 3.2.

    Args:
        dim: channels C of a token.
        tokens: tokens K in.
        patches: tokens R out.
        ratio: hidden sizes, as a multiple of R and of C.

    Example:
        >>> RecoverTokens(48, 11, 22)(torch.randn(2, 11, 48)).shape
        torch.Size([2, 22, 48])
    """

    def __init__(self, dim: int, tokens: int, patches: int, *, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mlp1 = MLP(tokens, int(patches * ratio), out=patches)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp2 = MLP(dim, int(dim * ratio))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, K, C) → (B, R, C)."""
        x = self.mlp1(self.norm1(tokens).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp2(self.norm2(x))


class TrainingParts(nn.Module):
    """The parts of a SiT that no inference runs.

    Attributes:
        recover: block index, as a string, → its `RecoverTokens`; for every block that leaves fewer
            patch tokens than the image has.
        aux_head: a head that the official checkpoints hold and that nothing calls; frozen, there to
            be given back as it came.
    """

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.recover = nn.ModuleDict(
            {
                str(block): RecoverTokens(config.embed_dim, tokens, config.patches)
                for block, tokens in enumerate(config.tokens_after)
                if tokens < config.patches
            }
        )
        self.aux_head: nn.Module = nn.Identity()
        if config.num_classes:
            self.aux_head = nn.Linear(config.embed_dim, config.num_classes).requires_grad_(False)

    def forward(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Patch tokens behind every block, each (B, K, C) → as many, each (B, R, C)."""
        recovered = []
        for block, one in enumerate(tokens):
            name = str(block)
            recovered.append(self.recover[name](one) if name in self.recover else one)
        return recovered
