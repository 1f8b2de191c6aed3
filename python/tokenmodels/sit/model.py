"""The SiT network: convolutional stem, transformer blocks, token slimming between stages."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from tokenmodels._blocks import Block, initialise, resample_positions
from tokenmodels._refuse import refusal
from tokenmodels.sit import checkpoint, pretrained
from tokenmodels.sit.config import PATCH, SiTConfig, grid_of
from tokenmodels.sit.recovery import TrainingParts
from tokenmodels.sit.slimming import SlimTokens, unpool
from tokenmodels.sit.stem import Stem


class SiTOutput(NamedTuple):
    """What a SiT gives where more than its logits was asked for; the rest is empty.

    Attributes:
        logits: (B, num_classes).
        assignments: per slimming (B, M, N), what each slot takes of each token before it.
        tokens: per block (B, K, C), its patch tokens, behind the slimming where one follows it.
        heads: (B, num_classes) per head, whose mean `logits` are: that of the class token, and with
            `config.dist_token` that of the distillation token.
    """

    logits: Tensor
    assignments: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]
    heads: tuple[Tensor, ...]


class SiT(nn.Module):
    """The self-slimmed vision transformer, or with `config.dense` its teacher.

    The class token and the patch tokens share one tensor; only a slimming parts them. Images may
    have any size from one patch on: the position embedding is interpolated, and each slot chooses
    among more or fewer tokens; the numbers of slots stay those of the config.

    Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, figure 2.

    Args:
        config: its shape; see `SiTConfig.variant` for the released ones.
        training_parts: whether it has `TrainingParts`, which only training needs.

    Example:
        >>> model = SiT(SiTConfig.variant("sit_tiny")).eval().fold_for_inference()
        >>> model(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """

    def __init__(self, config: SiTConfig, *, training_parts: bool = False) -> None:
        super().__init__()
        if not isinstance(config, SiTConfig):
            raise TypeError(refusal("SiT", "config", "a SiTConfig", repr(config)))
        self.config = config
        self.folded = False
        self.recompute = False
        dim, last = config.embed_dim, max(config.depth - 1, 1)
        self.stem = Stem(config.stem_layers, config.in_channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.patches, dim))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.num_heads,
                mlp_ratio=config.mlp_ratio,
                residual_scale=config.residual_scale,
                drop_path=config.drop_path * i / last,
            )
            for i in range(config.depth)
        )
        self.slims = nn.ModuleList(SlimTokens(dim, slots) for slots in config.slim_after.values())
        self.norm = nn.LayerNorm(dim)
        self.head = _head(config)
        if config.dist_token:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.dist_pos_embed = nn.Parameter(torch.zeros(1, 1, dim))
            self.head_dist = _head(config)
        self.training_parts = TrainingParts(config) if training_parts else None
        initialise(self)
        for value in self.parameters(recurse=False):  # tokens and positions
            nn.init.trunc_normal_(value, std=0.02)

    def forward(
        self, images: Tensor, *, return_assignment: bool = False, return_tokens: bool = False
    ) -> Tensor | SiTOutput:
        """Logits of normalised images.

        Args:
            images: (B, in_channels, height, width), in the dtype of the weights.
            return_assignment: also what the slots of each slimming take of the tokens before it,
                for pictures and `unpool`; each is one more pass over those tokens.
            return_tokens: also the patch tokens behind every block.

        Returns:
            (B, num_classes), or the class token's features (B, C) where there are no classes; a
            `SiTOutput` where more was asked for.

        Raises:
            ValueError: images of another number of channels or dimensions, or below one patch.
            TypeError: images that are no floating tensor.
        """
        assignments: list[Tensor] | None = [] if return_assignment else None
        tokens: list[Tensor] | None = [] if return_tokens else None
        x = self._run(images, assignments=assignments, tokens=tokens)
        heads: tuple[Tensor, ...] = (self.head(self.norm(x[:, 0])),)
        logits = heads[0]
        if self.config.dist_token:
            heads += (self.head_dist(self.norm(x[:, 1])),)
            logits = (heads[0] + heads[1]) / 2
        if assignments is None and tokens is None:
            return logits
        return SiTOutput(logits, tuple(assignments or ()), tuple(tokens or ()), heads)

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens behind the last block: (B, prefix + M, C), the class token first."""
        return self.norm(self._run(images))

    def features_only(self, images: Tensor, *, unpooled: bool = False) -> list[Tensor]:
        """Patch tokens at the end of every stage, before the slimming behind it.

        Args:
            images: (B, in_channels, height, width).
            unpooled: brings the slots of later stages back to the patches they came from, so that
                every stage has a grid (see `unpool`).

        Returns:
            Per stage a map (B, C, h, w) where its tokens are a grid: before the first slimming, and
            everywhere in a dense network or if `unpooled`. Else the slots, (B, M, C).
        """
        assignments: list[Tensor] = []
        stages: list[Tensor] = []
        self._run(images, assignments=assignments if unpooled else None, stages=stages)
        for i in range(1, 1 + len(assignments)):
            stages[i] = unpool(stages[i], assignments[:i])
        grid = grid_of((images.shape[2], images.shape[3]))
        maps = len(stages) if unpooled or self.config.dense else 1
        return [x.transpose(1, 2).unflatten(2, grid) for x in stages[:maps]] + stages[maps:]

    def embed(self, images: Tensor) -> Tensor:
        """(B, in_channels, height, width) → (B, prefix + N, C): class token, patches, positions."""
        self._check_images(images)
        grid = self.stem(images)
        shape = (grid.shape[2], grid.shape[3])
        positions = resample_positions(self.pos_embed, self.config.grid, shape)
        first: Tensor = self.cls_token
        if self.config.dist_token:
            first = torch.cat((first, self.dist_token), dim=1)
            positions = torch.cat((positions[:, :1], self.dist_pos_embed, positions[:, 1:]), dim=1)
        first = first.expand(grid.shape[0], -1, -1)
        return torch.cat((first, grid.flatten(2).transpose(1, 2)), dim=1) + positions

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(refusal("SiT", "images", "a floating tensor", got))
        channels = self.config.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            allowed = f"(batch, {channels}, height, width)"
            raise ValueError(refusal("SiT", "images", allowed, tuple(images.shape)))
        if images.shape[2] < PATCH or images.shape[3] < PATCH:
            allowed = f"a height and width of {PATCH} pixels, one patch, or more"
            raise ValueError(refusal("SiT", "images", allowed, tuple(images.shape)))

    def _run(
        self,
        images: Tensor,
        *,
        assignments: list[Tensor] | None = None,
        tokens: list[Tensor] | None = None,
        stages: list[Tensor] | None = None,
    ) -> Tensor:
        """All blocks; on the way it writes down what is asked for. Returns (B, prefix + M, C)."""
        x, first = self.embed(images), self.config.prefix
        recompute = self.recompute and torch.is_grad_enabled()
        slims = dict(zip(self.config.slim_after, self.slims, strict=True))
        ends = {end - 1 for end in accumulate(self.config.stages)}
        for i, block in enumerate(self.blocks):
            x = checkpointed(block, x, use_reentrant=False) if recompute else block(x)
            if stages is not None and i in ends:
                stages.append(x[:, first:])
            if i in slims:
                patches = x[:, first:]
                if assignments is not None:
                    assignments.append(slims[i].assignment(patches))  # type: ignore[operator]
                x = torch.cat((x[:, :first], slims[i](patches)), dim=1)
            if tokens is not None:
                tokens.append(x[:, first:])
        return x

    def set_fused(self, fused: bool) -> SiT:
        """Runs the slimmings as one kernel each, or (False) in plain PyTorch; returns itself.

        Plain PyTorch knows float64 and can be given to run-times that know torch's operators only.
        """
        for slim in self.slims:
            slim.fused = fused  # type: ignore[assignment]
        return self

    def set_recompute(self, recompute: bool) -> SiT:
        """Training keeps what goes into each block and computes the rest again for the gradients,
        which takes a third more time and a fraction of the memory; returns itself.
        """
        self.recompute = recompute
        return self

    @torch.no_grad()
    def resized(self, image_size: int | tuple[int, int]) -> SiT:
        """Returns a copy made for another image size: positions interpolated once, not per call.

        It gives what this model gives for such images; the numbers of slots stay as they are. What
        is in `training_parts` depends on the size and is left behind.
        """
        keep = tuple(self.config.slim_after.values()) or self.config.keep
        config = replace(self.config, image_size=image_size, keep=keep)
        other = self.without_training_parts()
        positions = resample_positions(other.pos_embed, other.config.grid, config.grid)
        trained = other.pos_embed.requires_grad
        other.config, other.pos_embed = config, nn.Parameter(positions.clone(), trained)
        return other

    @torch.no_grad()
    def fold_for_inference(self) -> SiT:
        """Returns a copy in which nothing is left to do that weights can absorb.

        Batch norms go into the stem's convolutions, the residual scale into each branch's last
        linear layer, every logit scale into its slot projection, whose bias without effect goes, as
        do training parts. Equal to this model in eval mode up to rounding; not meant for training.
        """
        folded = self.without_training_parts().eval().requires_grad_(False)
        if not self.folded:
            for part in (folded.stem, *folded.blocks, *folded.slims):
                part.fold()
        folded.folded = True
        return folded

    def without_training_parts(self) -> SiT:
        """Returns a copy that has all that inference needs."""
        other = copy.deepcopy(self)
        other.training_parts = None
        return other

    @torch.no_grad()
    def transplant(self, teacher: SiT) -> list[str]:
        """Takes over a teacher's weights: stem, tokens, positions, blocks, norm, and the head where
        both have as many classes.

        Positions of another image size are interpolated.

        Returns:
            The names of the weights that stay as they were, such as those of the slimmings.

        Raises:
            ValueError: a teacher of another width, depth or stem.

        Example:
            >>> shape = dict(embed_dim=48, depth=2, num_heads=3)
            >>> teacher = SiT(SiTConfig(**shape, dense=True))
            >>> left = SiT(SiTConfig(**shape, stages=(1, 1))).transplant(teacher)
            >>> {name.split(".")[0] for name in left}
            {'slims'}
        """
        return checkpoint.transplant(self, teacher)

    @classmethod
    def from_official(
        cls,
        source: str | Path | Mapping[str, Any],
        *,
        variant: str | None = None,
        config: SiTConfig | None = None,
        training_parts: bool = False,
    ) -> SiT:
        """Builds a SiT, or a dense teacher, from a checkpoint of the official code.

        Args:
            source: a file, or the state dict, or the checkpoint that holds it as `model`. A file is
                read with `weights_only=True`.
            variant: the released network that it must be a student of; its classes and image size
                are read from the weights.
            config: or what it describes, in full. With neither, the released shapes are assumed
                (see `infer_config`); a student stripped of its `rtsm.*` weights needs one of them,
                because nothing else tells where its tokens are slimmed.
            training_parts: keeps `rtsm.*` and `aux_head.*`, which no inference needs.

        Returns:
            The model in eval mode, on the CPU, in the dtype of the weights.

        Raises:
            ValueError: a file that cannot be read, weights of another variant, missing or
                unexpected names, a config that cannot be inferred.
            FileNotFoundError: there is no such file.

        Example:
            >>> config = SiTConfig(embed_dim=64, depth=2, num_heads=1, stages=(1, 1))
            >>> weights = SiT(config, training_parts=True).official_state_dict()
            >>> SiT.from_official({"model": weights}).config == config
            True
        """
        model = checkpoint.from_official(
            cls, source, variant=variant, config=config, training_parts=training_parts
        )
        assert isinstance(model, cls)
        return model

    def official_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names and in the shapes of the official code.

        With training parts they are all that it loads strictly; without, `rtsm.*` and `aux_head.*`
        are not there. The tensors are the model's own, not copies.

        Raises:
            ValueError: the model is folded, its weights are others.
        """
        return checkpoint.official_state_dict(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into a folder, which is made.

        Each is written under another name, flushed to disk and renamed, so that whoever reads finds
        the old file or the new one, whole.

        Raises:
            ValueError: the model is folded; fold what `from_pretrained` gives.

        Example:
            >>> import tempfile
            >>> model = SiT(SiTConfig(embed_dim=16, depth=2, num_heads=2, stages=(1, 1)))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save_pretrained(folder)
            ...     SiT.from_pretrained(folder).config == model.config
            True
        """
        pretrained.save(self, folder)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> SiT:
        """Reads what `save_pretrained` wrote.

        Args:
            name: a folder, or the id of a repository on the Hugging Face hub, which takes the
                package huggingface_hub.
            revision: of the repository.

        Returns:
            The model in eval mode, on the CPU, in the dtype in which it was saved.

        Raises:
            ValueError: files that cannot be read, missing or unexpected names.
            FileNotFoundError: there is no such folder, or a file is not in it.
            ImportError: a hub id, and no huggingface_hub.
        """
        model = pretrained.load(cls, name, revision=revision)
        assert isinstance(model, cls)
        return model


def _head(config: SiTConfig) -> nn.Module:
    """From a token's features to classes; features remain where there are none."""
    return nn.Linear(config.embed_dim, config.num_classes) if config.num_classes else nn.Identity()
