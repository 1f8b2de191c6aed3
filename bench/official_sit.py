"""SiT's forward pass as its authors formulated it, on the weights of a SiT that is not folded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tokenmodels._blocks import MLP, Attention
from tokenmodels.sit import SlimTokens
from tokenmodels.sit.stem import Stem
from torch import Tensor


def embed(model: Any, images: Tensor) -> Tensor:
    """Class token and patches, one behind the other, and the positions of both."""
    patches = stem(model.stem, images).flatten(2).transpose(1, 2)
    cls = model.cls_token.expand(images.shape[0], -1, -1)
    return torch.cat((cls, patches), dim=1) + model.pos_embed


def stem(layers: Stem, images: Tensor) -> Tensor:
    """A batch norm behind every convolution, a GELU behind every one but the last."""
    x = images
    for i, (conv, norm) in enumerate(zip(layers.convs, layers.norms, strict=True)):
        x = norm(conv(x if i == 0 else F.gelu(x)))
    return x


def attention(layer: Attention, x: Tensor) -> Tensor:
    """Every score is written out, in float32 whatever x is."""
    batch, tokens, dim = x.shape
    qkv = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = (part.float() for part in qkv)
    scores = (q @ k.transpose(-2, -1)) * (dim // layer.num_heads) ** -0.5
    return layer.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, dim))


def mlp(layer: MLP, x: Tensor) -> Tensor:
    """Two linear layers."""
    return layer.fc2(F.gelu(layer.fc1(x)))


def slim_tokens(layer: SlimTokens, x: Tensor) -> Tensor:
    """The token slimming module: softmax over dimension 1, then a batched product."""
    hidden = F.gelu(layer.fc1(layer.norm(x)))
    weights = (layer.logit_scale * layer.fc2(hidden)).softmax(1)
    return torch.bmm(weights.transpose(1, 2), x)


def forward(model: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the patch tokens behind every block, of a SiT.

    The class token is split off and put back after every block, batch norms and residual scales
    are operations of their own, the last layer norm sees all tokens.
    """
    x = embed(model, images)
    slims = dict(zip(model.config.slim_after, model.slims, strict=True))
    seen = []
    for i, block in enumerate(model.blocks):
        x = x + attention(block.attn, block.norm1(x)) / block.residual_scale
        x = x + mlp(block.mlp, block.norm2(x)) / block.residual_scale
        cls, patches = x[:, :1], x[:, 1:]
        if i in slims:
            patches = slim_tokens(slims[i], patches)
        seen.append(patches)
        x = torch.cat((cls, patches), dim=1)
    return model.head(model.norm(x)[:, 0]), seen
