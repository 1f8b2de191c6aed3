"""SiT's convolutional stem: an image to a grid of patch tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmodels._frozen import convolution


class Stem(nn.Module):
    """3x3 convolutions with batch norm, GELU between them.

    Source: the released SiT models; neither the plain patches of ViT nor the stem of LV-ViT.

    Args:
        layers: (channels, stride) per convolution.
        in_channels: channels of the image.

    Example:
        >>> Stem(((8, 2), (16, 2)), 3)(torch.randn(2, 3, 32, 30)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(self, layers: tuple[tuple[int, int], ...], in_channels: int) -> None:
        super().__init__()
        before = (in_channels, *(channels for channels, _ in layers[:-1]))
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False)
            for a, (b, stride) in zip(before, layers, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels, _ in layers)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, height, width) → (B, C, h, w)."""
        x, last = images, len(self.convs) - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if isinstance(norm, nn.Identity):
                x = convolution(x, conv, gelu=i < last)  # type: ignore[arg-type]
            else:
                x = norm(conv(x))
                x = F.gelu(x) if i < last else x
        return x

    @torch.no_grad()
    def fold(self) -> None:
        """Moves every batch norm's running statistics into the convolution before it."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            self.convs[i] = torch.nn.utils.fuse_conv_bn_eval(conv, norm)
            self.norms[i] = nn.Identity()
        # Then the tokens are rows without a copy.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
