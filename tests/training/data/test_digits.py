"""The embedded digits against scikit-learn's and a checksum."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from neq_cli.training.data.catalogue import CATALOGUE
from neq_cli.training.data.digits import FILE, load_digits


def test_the_file_is_the_one_that_was_made() -> None:
    tensors = load_file(FILE)
    assert tensors["images"].shape == (1797, 8, 8)
    assert tensors["images"].dtype == tensors["labels"].dtype == torch.uint8
    content = tensors["images"].numpy().tobytes() + tensors["labels"].numpy().tobytes()
    assert hashlib.sha256(content).hexdigest() == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_the_file_names_its_source_and_licence() -> None:
    with safe_open(FILE, "pt") as file:
        metadata = file.metadata()
    assert metadata["doi"] == "10.24432/C50P49"
    assert metadata["licence"] == "CC BY 4.0"
    assert "E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998" in metadata["source"]


def test_both_parts_together_are_scikit_learns_digits() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    (train, train_labels), (test, test_labels) = load_digits()
    every_fifth = [index for index in range(1797) if index % 5 == 4]
    others = sorted(set(range(1797)) - set(every_fifth))
    assert (train[:, 0].numpy() * 16 == digits.images[others]).all()
    assert (test[:, 0].numpy() * 16 == digits.images[every_fifth]).all()
    assert train_labels.tolist() == digits.target[others].tolist()
    assert test_labels.tolist() == digits.target[every_fifth].tolist()


def test_the_statistics_are_those_of_the_training_part() -> None:
    (train, _), _ = load_digits()
    assert CATALOGUE["digits"].statistics == ((round(train.mean().item(), 4),), (round(train.std().item(), 4),))
