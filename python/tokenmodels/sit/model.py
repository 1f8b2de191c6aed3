"""The SiT network in inference form: convolutional stem, transformer blocks, token slimming."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenkernels as tk
from tokenmodels.sit.config import SiTConfig


class SlimTokens(nn.Module):
    """The token slimming module: N tokens in, M learned soft aggregates of them out.

    Each of the M slots is a softmax-weighted mean of the raw input tokens. N is free, M is not.

    Source: Zong et al., ECCV 2022, section 3.1, equations 2 and 3. The bias of the last
    projection is constant along the softmax and is left out: it has no effect and no gradient.

    Args:
        dim: channels C of a token.
        slots: tokens M out.
        hidden: channels of the projection; C // 2 if not given.

    Example:
        >>> SlimTokens(384, 98)(torch.randn(2, 196, 384)).shape
        torch.Size([2, 98, 384])
    """

    def __init__(self, dim: int, slots: int, *, hidden: int | None = None) -> None:
        super().__init__()
        hidden = dim // 2 if hidden is None else hidden
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, slots, bias=False)
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) → (B, M, C)."""
        return tk.slim_tokens(
            tokens,
            self.norm.weight,
            self.norm.bias,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.logit_scale,
            eps=self.norm.eps,
        )


class Stem(nn.Module):
    """3x3 convolutions of stride 2 with batch norm, GELU between them: an image to a token grid."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False)
            for a, b in zip((3, *channels[:-1]), channels, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) → (B, N, C), row by row."""
        x = images
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x if i == 0 else F.gelu(x)))
        return x.flatten(2).transpose(1, 2)

    def fold(self) -> None:
        """Moves every batch norm's running statistics into the convolution before it."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            self.convs[i] = torch.nn.utils.fuse_conv_bn_eval(conv, norm)
            self.norms[i] = nn.Identity()
        # Then the tokens are rows without a copy.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Attention(nn.Module):
    """Multi-head self-attention; the joint projection has no bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block whose two branches are divided by `residual_scale`."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = Attention(config.dim, config.heads)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = MLP(config.dim, int(config.dim * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.attn(self.norm1(x)), alpha=1 / self.residual_scale)
        return torch.add(x, self.mlp(self.norm2(x)), alpha=1 / self.residual_scale)

    def fold(self) -> None:
        """Moves the residual scale into the last linear layer of each branch."""
        for last in (self.attn.proj, self.mlp.fc2):
            last.weight.div_(self.residual_scale)
            last.bias.div_(self.residual_scale)
        self.residual_scale = 1.0


class SiT(nn.Module):
    """The self-slimmed vision transformer, or with `config.slim=False` its dense teacher.

    The class token and the patch tokens share one tensor; only a slimming parts them.

    Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, figure 2.

    Example:
        >>> model = SiT(VARIANTS["sit_tiny"]).eval().fold_for_inference()
        >>> model(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config.stem_channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.slims = nn.ModuleList(SlimTokens(config.dim, m) for m in config.slim_after.values())
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.classes)
        self._initialise()

    def _initialise(self) -> None:
        """Truncated normals of standard deviation 0.02 for what is linear or a token, no biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) → (B, 1 + N, C): class token, patches, positions."""
        patches = self.stem(images)
        if patches.shape[1] + 1 != self.pos_embed.shape[1]:
            raise ValueError(
                f"SiT: images: allowed {self.config.grid} x {self.config.grid} patches, as in "
                f"{self.config.image_size} x {self.config.image_size} pixels, "
                f"got {tuple(images.shape)}"
            )
        cls = self.cls_token.expand(len(patches), -1, -1)
        return torch.cat((cls, patches), dim=1) + self.pos_embed

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images: (B, 3, height, width) → (B, classes)."""
        x = self.embed(images)
        slims = dict(zip(self.config.slim_after, self.slims, strict=True))
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in slims:
                x = torch.cat((x[:, :1], slims[i](x[:, 1:])), dim=1)
        return self.head(self.norm(x[:, 0]))

    @torch.no_grad()
    def fold_for_inference(self) -> SiT:
        """Returns a copy in which nothing is left to do that weights can absorb.

        Batch norms go into the stem's convolutions, the residual scale into each branch's last
        linear layer, every logit scale into its slot projection. Equal to this model in eval mode
        up to rounding; not meant for training.
        """
        folded = copy.deepcopy(self).eval().requires_grad_(False)
        folded.stem.fold()
        for block in folded.blocks:
            assert isinstance(block, Block)
            block.fold()
        for slim in folded.slims:
            assert isinstance(slim, SlimTokens)
            slim.fc2.weight.mul_(slim.logit_scale)
            slim.logit_scale.fill_(1.0)
        return folded
