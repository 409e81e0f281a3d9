"""Layers of torch's own in models that are made of little else, beyond what torchvision has."""

from __future__ import annotations

from typing import Any

import torch
from architectures.case import Case, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class LanguageModel(nn.Module):
    """A recurrent layer between an embedding and a linear layer."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.recurrent = kind(8, 12, batch_first=True, **options)
        size = options.get("proj_size", 0) or 12
        self.head = nn.Linear(size * (2 if options.get("bidirectional") else 1), 40)

    def forward(self, words: Tensor) -> Tensor:
        hidden, _ = self.recurrent(self.embedding(words))
        return self.head(hidden)


class Cells(nn.Module):
    """Recurrent cells, which their user calls step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.lstm, self.gru, self.rnn = nn.LSTMCell(8, 12), nn.GRUCell(12, 10), nn.RNNCell(10, 6)
        self.head = nn.Linear(6, 40)

    def forward(self, words: Tensor) -> Tensor:
        first, second, third, outputs = None, None, None, []
        for step in self.embedding(words).unbind(1):
            first = self.lstm(step, first)
            second = self.gru(first[0], second)
            third = self.rnn(second, third)
            outputs.append(self.head(third))
        return torch.stack(outputs, 1)


class Translator(nn.Module):
    """``nn.Transformer`` between two embeddings and a linear layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(40, 16), nn.Embedding(30, 16)
        self.transformer = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True, **options)
        self.head = nn.Linear(16, 30)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=self.head.weight.dtype)
        hidden = self.transformer(self.source(source), self.target(target), tgt_mask=mask)
        return self.head(hidden)


class Pairs(nn.Module):
    """Bags of words, compared by a bilinear layer; PReLU with a number for each feature."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.left, self.right = nn.EmbeddingBag(40, 8, mode=mode), nn.EmbeddingBag(40, 6, mode=mode)
        self.compare, self.activation = nn.Bilinear(8, 6, 10), nn.PReLU(10)
        self.head = nn.Linear(10, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.activation(self.compare(self.left(words), self.right(words))))


class Normed(nn.Sequential):
    """Convolutions and linear layers whose weights are normed, in the old way or the new."""

    def __init__(self, norm: Any) -> None:
        super().__init__(
            norm(nn.Conv1d(4, 8, 3, padding=1)),
            nn.Tanh(),
            norm(nn.Conv1d(8, 8, 3, groups=2, bias=False)),
            nn.Tanh(),
            nn.Flatten(),
            norm(nn.Linear(8 * 6, 10)),
            nn.Tanh(),
            nn.Linear(10, 3),
        )


class Decoder(nn.Sequential):
    """Transposed convolutions, in groups too, between norms of all kinds."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(6, 8 * 4),
            nn.Unflatten(1, (8, 2, 2)),
            nn.GroupNorm(2, 8),
            nn.ConvTranspose2d(8, 12, 2, stride=2),
            nn.InstanceNorm2d(12, affine=True),
            nn.PReLU(12),
            nn.ConvTranspose2d(12, 6, 3, groups=3, bias=False),
            nn.LayerNorm([6, 6, 6]),
            nn.Conv2d(6, 3, 1),
        )


def _pair() -> dict[str, Tensor]:
    return {"source": torch.randint(0, 40, (2, 5)), "target": torch.randint(0, 30, (2, 4))}


MODELS: dict[str, Case] = {
    "lstm": Case(lambda: LanguageModel(nn.LSTM), tokens(), quick=True, never=("head",)),
    "lstm-both-ways-two-layers-projected": Case(
        lambda: LanguageModel(nn.LSTM, num_layers=2, bidirectional=True, proj_size=5), tokens(), never=("head",)
    ),
    "gru-both-ways-two-layers": Case(
        lambda: LanguageModel(nn.GRU, num_layers=2, bidirectional=True), tokens(), never=("head",)
    ),
    "rnn-three-layers-no-bias": Case(
        lambda: LanguageModel(nn.RNN, num_layers=3, bias=False), tokens(), never=("head",)
    ),
    "cells": Case(Cells, tokens(), never=("head",)),
    "transformer": Case(Translator, _pair, quick=True, never=("head",)),
    "transformer-norm-first": Case(
        lambda: Translator(norm_first=True, activation="gelu", bias=False), _pair, never=("head",)
    ),
    "bilinear-embedding-bag-mean": Case(lambda: Pairs("mean"), tokens(), never=("head",)),
    "bilinear-embedding-bag-sum": Case(lambda: Pairs("sum"), tokens(), quick=True, never=("head",)),
    "weight-norm": Case(lambda: Normed(parametrizations.weight_norm), lambda: torch.randn(2, 4, 8), never=("7",)),
    "weight-norm-old": Case(lambda: Normed(nn.utils.weight_norm), lambda: torch.randn(2, 4, 8), never=("7",)),
    "spectral-norm": Case(
        lambda: Normed(parametrizations.spectral_norm),
        lambda: torch.randn(2, 4, 8),
        quick=True,
        never=("7",),
        coupled=("0", "2", "5"),
    ),
    "spectral-norm-old": Case(
        lambda: Normed(nn.utils.spectral_norm), lambda: torch.randn(2, 4, 8), never=("7",), coupled=("0", "2", "5")
    ),
    "transposed-and-all-norms": Case(Decoder, lambda: torch.randn(2, 6), quick=True, never=("8",)),
}
