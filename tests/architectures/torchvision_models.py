"""torchvision's models, a few of each kind, narrow where their constructors let them be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torchvision
from architectures.case import POSITIONS, RELATIVE, TOKEN, Case, images
from torch import Tensor, nn
from torchvision.models import ConvNeXt, MaxVit, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck


def builder(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Return what builds a model by torchvision's name of it."""
    options = {"weights": None, "num_classes": 5, **options}
    return partial(torchvision.models.get_model, name, **options)


def _convnext() -> nn.Module:
    widths = [8, 12, 16, 24, None]
    blocks = [CNBlockConfig(width, after, 1) for width, after in pairwise(widths)]
    return ConvNeXt(blocks, num_classes=5, layer_scale=0.5)  # type: ignore[arg-type]


def _detection_loss(model: nn.Module, pictures: list[Tensor]) -> Tensor:
    boxes = pictures[0].new_tensor([[4.0, 4.0, 40.0, 50.0], [20.0, 10.0, 60.0, 40.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in pictures]
    return sum(model(pictures, targets).values())


def _detect(model: nn.Module, pictures: list[Tensor]) -> Any:
    return model(pictures)


_BARE = {"weights_backbone": None}

MODELS: dict[str, Case] = {
    "resnet18": Case(builder("resnet18"), images(64), never=("fc",)),
    "resnext": Case(
        lambda: torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=4, num_classes=5),
        images(64),
        never=("fc",),
    ),
    "regnet_y_400mf": Case(builder("regnet_y_400mf"), images(64), never=("fc",)),
    "efficientnet_b0": Case(builder("efficientnet_b0"), images(64), never=("classifier.1",)),
    "mobilenet_v3_small": Case(builder("mobilenet_v3_small"), images(64), never=("classifier.3",)),
    "mnasnet0_5": Case(builder("mnasnet0_5"), images(64), never=("classifier.1",)),
    "shufflenet_v2_x0_5": Case(builder("shufflenet_v2_x0_5"), images(64), never=("fc",)),
    "squeezenet1_1": Case(builder("squeezenet1_1"), images(64), never=("classifier.1",)),
    "densenet": Case(
        lambda: torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=5), images(64), never=("classifier",)
    ),
    "googlenet": Case(
        builder("googlenet", init_weights=False, aux_logits=True),
        images(64),
        never=("aux*", "fc"),
    ),
    "inception_v3": Case(builder("inception_v3", init_weights=False, aux_logits=False), images(128), never=("fc",)),
    "convnext": Case(_convnext, images(32), quick=True, never=("classifier.2",)),
    "vit": Case(
        lambda: VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=5),
        images(32),
        {"class_token": TOKEN, "encoder.pos_embedding": POSITIONS},
        never=("heads.head",),
    ),
    "swin": Case(
        lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5),
        images(32),
        {"*.relative_position_bias_table": RELATIVE},
        never=("head",),
    ),
    "swin_v2": Case(
        lambda: torchvision.models.SwinTransformer(
            [4, 4],
            24,
            [2, 2],
            [2, 4],
            [4, 4],
            num_classes=5,
            block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
        ),
        images(32),
        quick=True,
        never=("head",),
    ),
    "maxvit": Case(
        lambda: MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=5),
        images(64),
        {"*.relative_position_bias_table": RELATIVE},
        never=("classifier.5",),
    ),
    "r3d_18": Case(builder("r3d_18"), lambda: torch.randn(2, 3, 4, 32, 32), never=("fc",)),
    "lraspp_mobilenet_v3_large": Case(
        builder("lraspp_mobilenet_v3_large", **_BARE),
        images(64),
        never=("classifier.low_classifier", "classifier.high_classifier"),
    ),
    "deeplabv3_mobilenet_v3_large": Case(
        builder("deeplabv3_mobilenet_v3_large", aux_loss=True, **_BARE),
        images(64),
        never=("classifier.4", "aux_classifier.4"),
    ),
    "retinanet_resnet50_fpn": Case(
        builder("retinanet_resnet50_fpn", min_size=64, max_size=64, trainable_backbone_layers=5, **_BARE),
        lambda: [torch.rand(3, 64, 64) for _ in range(2)],
        call=_detect,
        loss=_detection_loss,
        never=("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
    ),
}
