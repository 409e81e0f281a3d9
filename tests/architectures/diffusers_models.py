"""diffusers' networks, which take a time besides the images, so that their user says how they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures.case import Case, images
from torch import Tensor, nn


def diffusers(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Return what builds a network by its class's name."""

    def make() -> nn.Module:
        library = pytest.importorskip("diffusers")
        return getattr(library, name)(**options)

    return make


_WIDTHS = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def _denoise(model: nn.Module, item: Any) -> Tensor:
    pictures, steps, *others = item
    return model(pictures, steps, *others).sample


def _noisy() -> tuple[Tensor, Tensor]:
    return images(16)(), torch.tensor([3, 700])


def _conditioned() -> tuple[Tensor, Tensor, Tensor]:
    return images(16, 4)(), torch.tensor([3, 700]), torch.randn(2, 5, 12)


MODELS: dict[str, Case] = {
    "UNet2DModel": Case(
        diffusers(
            "UNet2DModel",
            **_WIDTHS,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
        ),
        _noisy,
        call=_denoise,
        quick=True,
        never=("conv_out",),
    ),
    "UNet2DConditionModel": Case(
        diffusers(
            "UNet2DConditionModel",
            **_WIDTHS,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
        ),
        _conditioned,
        call=_denoise,
        never=("conv_out",),
    ),
}
