"""1,797 real 8x8 digits, in the package: UCI Optical Recognition of Handwritten Digits, CC BY 4.0, 10.24432/C50P49."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

FILE = Path(__file__).with_name("digits.safetensors")


def load_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the training and the test part, each (images [n, 1, 8, 8] in [0, 1], labels [n]).

    The split is fixed: every fifth image of the file, from its fifth on, is a test image.
    """
    tensors = load_file(FILE)
    images = tensors["images"].unsqueeze(1).float() / 16
    labels = tensors["labels"].long()
    tested = torch.arange(len(labels)) % 5 == 4
    return (images[~tested], labels[~tested]), (images[tested], labels[tested])
