"""timm's models, a few of each kind, narrow and shallow where their constructors let them be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from architectures.case import POSITIONS, RELATIVE, SCALAR, TOKEN, Case, images
from torch import nn


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Return what builds a model by timm's name of it."""

    def make() -> nn.Module:
        library = pytest.importorskip("timm")
        return library.create_model(name, pretrained=False, **{"num_classes": 5, **options})

    return make


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
_VIT_OUTSIDE = {"cls_token": TOKEN, "pos_embed": POSITIONS}
_NARROW = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}
_NORM_FREE = {
    "depths": (1, 1, 1, 1),
    "channels": (32, 48, 64, 64),
    "group_size": 8,
    "stem_chs": 16,
    "num_features": 96,
}
_MAXVIT = {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64)}

MODELS: dict[str, Case] = {
    "vit_tiny_patch16_224": Case(timm("vit_tiny_patch16_224", **_VIT), images(32), _VIT_OUTSIDE, never=("head",)),
    "deit_tiny_distilled_patch16_224": Case(
        timm("deit_tiny_distilled_patch16_224", **_VIT),
        images(32),
        {**_VIT_OUTSIDE, "dist_token": TOKEN},
        never=("head", "head_dist"),
    ),
    "beit_base_patch16_224": Case(
        timm("beit_base_patch16_224", **_VIT),
        images(32),
        {"cls_token": TOKEN, "*.relative_position_bias_table": RELATIVE},
        quick=True,
        never=("head",),
    ),
    "beitv2_base_patch16_224": Case(
        timm("beitv2_base_patch16_224", **_VIT),
        images(32),
        {"cls_token": TOKEN, "*.relative_position_bias_table": RELATIVE},
        never=("head",),
    ),
    "eva02_tiny_patch14_224": Case(timm("eva02_tiny_patch14_224", **_VIT), images(32), _VIT_OUTSIDE, never=("head",)),
    "cait_xxs24_224": Case(timm("cait_xxs24_224", **_VIT), images(32), _VIT_OUTSIDE, never=("head",)),
    "convnext_atto": Case(timm("convnext_atto", **_NARROW), images(32), never=("head.fc",)),
    "convnextv2_atto": Case(timm("convnextv2_atto", **_NARROW), images(32), never=("head.fc",)),
    "swin_tiny_patch4_window7_224": Case(
        timm("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
        images(32),
        {"*.relative_position_bias_table": RELATIVE},
        never=("head.fc",),
    ),
    "swinv2_tiny_window8_256": Case(
        timm("swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
        images(32),
        never=("head.fc",),
    ),
    "maxvit_nano_rw_256": Case(
        timm("maxvit_nano_rw_256", **_MAXVIT), images(64), {"*.rel_pos.*": RELATIVE}, never=("head.fc",)
    ),
    "maxvit_rmlp_nano_rw_256": Case(timm("maxvit_rmlp_nano_rw_256", **_MAXVIT), images(64), never=("head.fc",)),
    "coatnet_nano_rw_224": Case(
        timm("coatnet_nano_rw_224", **_MAXVIT), images(64), {"*.rel_pos.*": RELATIVE}, never=("head.fc",)
    ),
    "levit_128s": Case(
        timm("levit_128s", img_size=96),
        images(96),
        {"*.attention_biases": RELATIVE},
        never=("head.linear", "head_dist.linear"),
    ),
    "edgenext_xx_small": Case(timm("edgenext_xx_small", dims=(16, 24, 32, 32)), images(64), never=("head.fc",)),
    "nfnet_l0": Case(timm("nfnet_l0", **_NORM_FREE), images(64), never=("head.fc",)),
    "dm_nfnet_f0": Case(timm("dm_nfnet_f0", **_NORM_FREE), images(64), {"*.skipinit_gain": SCALAR}, never=("head.fc",)),
    "resnetv2_50": Case(
        timm("resnetv2_50", layers=(1, 1, 1, 1), channels=(16, 32, 48, 64), stem_chs=16), images(64), never=("head.fc",)
    ),
    "resnetv2_50x1_bit": Case(timm("resnetv2_50x1_bit"), images(64), never=("head.fc",)),
    "hrnet_w18_small": Case(timm("hrnet_w18_small"), images(64), never=("classifier",)),
    "dla34": Case(timm("dla34"), images(64), never=("fc",)),
    "dla46_c": Case(timm("dla46_c"), images(64), never=("fc",)),
    "volo_d1_224": Case(
        timm("volo_d1_224", img_size=64),
        images(64),
        {"cls_token": TOKEN, "pos_embed": POSITIONS},
        never=("head", "aux_head"),
    ),
    "mobilenetv4_conv_small": Case(timm("mobilenetv4_conv_small"), images(64), never=("classifier",)),
    "efficientvit_b0": Case(timm("efficientvit_b0"), images(64), never=("head.classifier.4",)),
    "efficientvit_m0": Case(
        timm("efficientvit_m0", img_size=64), images(64), {"*.attention_biases": RELATIVE}, never=("head.linear",)
    ),
    "fastvit_t8": Case(timm("fastvit_t8"), images(64), never=("head.fc",)),
    "repvgg_a0": Case(timm("repvgg_a0", width_factor=0.25), images(64), never=("head.fc",)),
    "xcit_nano_12_p16_224": Case(
        timm("xcit_nano_12_p16_224", depth=2, embed_dim=48), images(64), {"cls_token": TOKEN}, never=("head",)
    ),
    "crossvit_tiny_240": Case(
        timm("crossvit_tiny_240", img_size=96, img_scale=(1.0, 1.0), depth=([1, 1, 0], [1, 1, 0], [1, 1, 0])),
        images(96),
        {"cls_token_*": TOKEN, "pos_embed_*": POSITIONS},
        never=("head.0", "head.1"),
    ),
    "mixer_s32_224": Case(timm("mixer_s32_224", img_size=64), images(64), never=("head",)),
    "resmlp_12_224": Case(timm("resmlp_12_224", img_size=64), images(64), never=("head",)),
    "gmlp_ti16_224": Case(timm("gmlp_ti16_224", img_size=64), images(64), never=("head",)),
    "poolformer_s12": Case(timm("poolformer_s12"), images(64), never=("head.fc",)),
    "regnety_002": Case(timm("regnety_002"), images(64), never=("head.fc",)),
}
