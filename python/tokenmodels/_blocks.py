"""Parts of a plain vision transformer, which the methods share: (B, N, C) in, (B, N, C) out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmodels._frozen import linear


class DropPath(nn.Module):
    """Stochastic depth: in training, an image's whole branch is zero with probability `rate`.

    What survives is scaled by 1 / (1 - rate), so that the mean stays.

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.

    Example:
        >>> DropPath(0.5).eval()(torch.ones(2, 3, 4)).sum()
        tensor(24.)
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(x.shape[:1] + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


class Attention(nn.Module):
    """Multi-head self-attention by `scaled_dot_product_attention`: (B, N, C) → (B, N, C).

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.

    Example:
        >>> Attention(48, 3)(torch.randn(2, 10, 48)).shape
        torch.Size([2, 10, 48])
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = linear(x, self.qkv).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return linear(mixed.transpose(1, 2).flatten(2), self.proj)


class MLP(nn.Module):
    """Two linear layers with an exact (erf) GELU between them: (…, dim) → (…, out)."""

    def __init__(self, dim: int, hidden: int, *, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.fc1, gelu=True), self.fc2)


class Block(nn.Module):
    """A pre-norm transformer block whose two branches are divided by `residual_scale`.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, eq. 2 and 3; the scale
    is that of LV-ViT (Jiang et al., NeurIPS 2021).

    Args:
        dim: channels C of a token.
        num_heads: they divide `dim`.
        mlp_ratio: hidden channels of the MLP, as a multiple of `dim`.
        residual_scale: see above.
        drop_path: probability with which a branch is left out in training.
        qkv_bias: whether the joint projection of the attention has a bias.

    Example:
        >>> Block(48, 3, residual_scale=2.0)(torch.randn(2, 10, 48)).shape
        torch.Size([2, 10, 48])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        residual_scale: float = 1.0,
        drop_path: float = 0.0,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        share = 1 / self.residual_scale
        x = torch.add(x, self.drop_path(self.attn(self.norm1(x))), alpha=share)
        return torch.add(x, self.drop_path(self.mlp(self.norm2(x))), alpha=share)

    @torch.no_grad()
    def fold(self) -> None:
        """Moves the residual scale into the last linear layer of each branch."""
        for last in (self.attn.proj, self.mlp.fc2):
            last.weight.div_(self.residual_scale)
            last.bias.div_(self.residual_scale)
        self.residual_scale = 1.0


def resample_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], *, prefix: int = 1
) -> Tensor:
    """Position embeddings of another grid of patches, by antialiased bicubic interpolation.

    Args:
        positions: (1, prefix + h·w, C), row by row.
        old: their grid, (h, w).
        new: the grid that is wanted.
        prefix: positions in front that belong to no patch; they stay as they are.

    Returns:
        (1, prefix + h'·w', C), in the dtype of `positions`; `positions` itself where nothing
        changes.

    Example:
        >>> resample_positions(torch.randn(1, 1 + 36, 48), (6, 6), (4, 9)).shape
        torch.Size([1, 37, 48])
    """
    if old == new:
        return positions
    wide = torch.promote_types(positions.dtype, torch.float32)  # some kernels know no halves
    grid = positions[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2).to(wide)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True)
    patches = grid.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat((positions[:, :prefix], patches), dim=1)


def initialise(module: nn.Module) -> None:
    """Truncated normals of standard deviation 0.02 for all linear weights in it, zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
