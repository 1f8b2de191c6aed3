"""A SiT for other run-times than torch: ONNX, of plain operators."""

from __future__ import annotations

from pathlib import Path

import torch

from tokenmodels.sit.model import SiT


def export_onnx(model: SiT, path: str | Path) -> None:
    """Writes a model's inference graph, folded and in plain operators, as one ONNX file.

    The graph takes `images`, (batch, in_channels, height, width) of the size in the config (see
    `SiT.resized` for another one) and any batch, and gives `logits`. It takes the packages onnx and
    onnxscript.

    Args:
        model: on the CPU; it stays as it is.
        path: the file.

    Example:
        >>> model = SiT(SiTConfig(embed_dim=48, depth=2, num_heads=3, stages=(1, 1)))
        >>> export_onnx(model, "sit.onnx")  # doctest: +SKIP
    """
    folded = model.fold_for_inference().set_fused(False)
    size = model.config.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    images = torch.zeros(2, model.config.in_channels, height, width, dtype=model.pos_embed.dtype)
    torch.onnx.export(
        folded,
        (images,),
        str(path),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        external_data=False,
        verbose=False,
    )
