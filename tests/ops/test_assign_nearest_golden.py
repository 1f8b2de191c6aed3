"""The ops of vector quantisation give what the official quantisers gave: indices, codes, losses,
EMA codebooks, residual chains.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tokenkernels as tk

DECAY, EPS = 0.8, 1e-5
"""vector-quantize-pytorch's defaults."""


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        request.getfixturevalue("native")
    return request.param


def tensors(golden: Path, name: str) -> dict[str, Tensor]:
    with np.load(golden / "one_d_piece" / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file}


@pytest.mark.parametrize("name", ["vq_l2_4096x12", "vq_euclid_1024x16"])
def test_one_d_piece_quantiser(golden: Path, backend: str, name: str) -> None:
    g = tensors(golden, name)
    codebook = F.normalize(g["codebook"], dim=-1) if g["use_l2_norm"] else g["codebook"]
    tokens = g["z"].movedim(1, -1)
    got = tk.assign_nearest(
        tokens,
        codebook,
        metric="cosine" if g["use_l2_norm"] else "l2",
        return_distance=True,
        return_codes=True,
        backend=backend,
    )
    assert torch.equal(got.index, g["indices"].view(got.index.shape))
    assert (got.codes.movedim(-1, 1) - g["z_quantized"]).abs().max() < 1e-6
    squared = got.distance * (2 if g["use_l2_norm"] else 1)
    commitment = g["commitment_cost"] * squared.sum() / tokens.numel()
    assert torch.isclose(commitment.float(), g["commitment_loss"], rtol=1e-6, atol=0)


def test_raw_codes_of_length_one_need_no_normalising(golden: Path, backend: str) -> None:
    g = tensors(golden, "vq_l2_4096x12")
    tokens = g["z"].movedim(1, -1)
    got = tk.assign_nearest(tokens, g["codebook"], metric="cosine", backend=backend)
    assert torch.equal(got.index.flatten(), g["indices"].flatten())


@pytest.mark.parametrize("kind", ["euclid", "cosine", "euclid_mask"])
def test_vector_quantize_pytorch_ema_step(golden: Path, backend: str, kind: str) -> None:
    g = {k.removeprefix(kind + "."): v for k, v in tensors(golden, "vqp_reference").items()}
    x, book = g["x"], g["before.embed"][0]
    if kind == "cosine":
        x = F.normalize(x, dim=-1, eps=1e-6)
    found = tk.assign_nearest(
        x, book, metric="cosine" if kind == "cosine" else "l2", return_codes=True, backend=backend
    )
    index = found.index.where(g["mask"], -1) if "mask" in g else found.index
    assert torch.equal(index, g["indices"])
    kept = (index >= 0)[..., None]
    assert (found.codes - g["quantize"]).where(kept, 0).abs().max() < 1e-6
    counts, sums = tk.accumulate_codes(x, index, len(book), backend=backend)
    size = g["before.cluster_size"][0].lerp(counts.float(), 1 - DECAY)
    total = g["before.embed_avg"][0].lerp(sums, 1 - DECAY)
    assert torch.allclose(size, g["after.cluster_size"][0], rtol=1e-6, atol=1e-7)
    assert torch.allclose(total, g["after.embed_avg"][0], rtol=1e-5, atol=1e-6)
    smoothed = (size + EPS) / (size.sum() + len(book) * EPS) * size.sum()
    embed = total / smoothed[:, None]
    if kind == "cosine":
        embed = F.normalize(embed, dim=-1, eps=1e-6)
    assert torch.allclose(embed, g["after.embed"][0], rtol=1e-5, atol=1e-6)


def test_vector_quantize_pytorch_residual_chain(golden: Path, backend: str) -> None:
    g = tensors(golden, "vqp_reference")
    got = tk.assign_residual(g["rvq.x"], g["rvq.codebooks"], backend=backend)
    assert torch.equal(got.index, g["rvq.indices"])
    assert (g["rvq.x"] - got.residual - g["rvq.quantize"]).abs().max() < 1e-6


def test_vector_quantize_pytorch_separate_codebooks_per_head(golden: Path, backend: str) -> None:
    g = tensors(golden, "vqp_reference")
    x, books = g["mh.x"], g["mh.codebook"]
    heads = x.view(*x.shape[:-1], len(books), -1)
    got = tk.assign_nearest(heads, books, return_codes=True, backend=backend)
    assert torch.equal(got.index, g["mh.indices"])
    assert (got.codes.flatten(-2) - g["mh.quantize"]).abs().max() < 1e-6
