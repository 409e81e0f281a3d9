"""What a model returned: the tensor that predictions are read from, and those of its auxiliary classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from torch.nn import functional

# Weights of auxiliary classifiers: Szegedy et al. 2015 for GoogLeNet; 0.4 is what PyTorch's Inception v3 fine-tuning
# tutorial uses; 0.5 is torchvision's segmentation training.
_GOOGLENET_AUXILIARY = 0.3
_INCEPTION_AUXILIARY = 0.4
_DICT_AUXILIARY = 0.5


def main_output(outputs: Any) -> Tensor:
    """Return the tensor that predictions are read from: of a tensor, of torchvision's tuples, of a mapping."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        for key in ("logits", "out"):
            if key in outputs:
                return cast(Tensor, outputs[key])
        raise TypeError(f"the model returned a mapping without 'logits' or 'out': {', '.join(map(str, outputs))}")
    if hasattr(outputs, "logits"):
        return cast(Tensor, outputs.logits)
    raise TypeError(f"the model returned a {type(outputs).__name__}; a tensor or a mapping with 'logits' is needed")


def scaled_to(logits: Tensor, masks: Tensor) -> Tensor:
    """Return logits [batch, classes, height, width] in the height and width of ``masks``, scaled bilinearly.

    Some networks, such as SegFormer, tell classes of a quarter of the height and width only; transformers' own losses
    scale them up like this.
    """
    size = masks.shape[-2:]
    if logits.ndim != 4 or logits.shape[-2:] == size:
        return logits
    return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def auxiliary_outputs(outputs: Any) -> list[tuple[float, Tensor]]:
    """Return (weight, logits) of the auxiliary classifiers that ``outputs`` hold, none in eval mode."""
    if isinstance(outputs, Tensor):
        return []
    if isinstance(outputs, Mapping):
        found = [(_DICT_AUXILIARY, outputs.get("aux"))]
    elif hasattr(outputs, "aux_logits1"):
        found = [(_GOOGLENET_AUXILIARY, outputs.aux_logits1), (_GOOGLENET_AUXILIARY, outputs.aux_logits2)]
    else:
        found = [(_INCEPTION_AUXILIARY, getattr(outputs, "aux_logits", None))]
    return [(weight, logits) for weight, logits in found if logits is not None]
