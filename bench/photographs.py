"""Real photographs for networks to look at: crops of those inside scikit-learn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenmodels._data.transforms import MEAN, STD
from torch import Tensor


def photographs(batch: int, size: int = 224) -> Tensor:
    """`batch` different crops of scikit-learn's photographs, normalised: (batch, 3, size, size)."""
    from sklearn.datasets import load_sample_images

    crops = []
    for number, image in enumerate(load_sample_images().images):
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        height, width = pixels.shape[2:]
        scale = size * 8 / 7 / min(height, width)
        shape = [round(height * scale), round(width * scale)]
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True)[0]
        count = (batch + 1 - number) // 2
        for i in range(count):
            top = (shape[0] - size) // 2
            left = (shape[1] - size) * (2 * i + 1) // (2 * count)
            crops.append(pixels[:, top : top + size, left : left + size])
    normal = (torch.stack(crops) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    return normal.contiguous()
