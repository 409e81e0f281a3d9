"""Swin Transformer checkpoints of its authors under torchvision's names; other checkpoints stay as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# The authors' name, and what torchvision calls it; the number of a stage becomes an odd place for its blocks and the
# even one after it for the merging of patches that follows.
_RENAMED = (
    (re.compile(r"^patch_embed\.proj\."), "features.0.0."),
    (re.compile(r"^patch_embed\.norm\."), "features.0.2."),
    (re.compile(r"\.mlp\.fc1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.fc2\."), ".mlp.3."),
)
_STAGE = re.compile(r"^layers\.(\d+)\.(blocks\.|downsample\.)")
_COMPUTED = "attn_mask"  # a buffer that torchvision computes in each pass


def as_torchvision(loaded: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``loaded`` as torchvision's Swin of state dict ``own`` names and shapes it; unchanged where it is none."""
    if "patch_embed.proj.weight" not in loaded or "features.0.0.weight" not in own:
        return dict(loaded)
    found = {}
    for name, tensor in loaded.items():
        if name.endswith(_COMPUTED):
            continue
        new = _renamed(name)
        # [window, window] there, one after the other here.
        found[new] = tensor.flatten() if new.endswith("relative_position_index") else tensor
    return found


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    stage = _STAGE.match(name)
    if stage is None:
        return name
    number = 2 * int(stage[1]) + (1 if stage[2] == "blocks." else 2)
    return f"features.{number}.{name[stage.end() :]}"
