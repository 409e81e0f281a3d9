"""Data, network and task for `language-model.yaml`: each byte of a text is predicted from those before it."""

import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def text(length: int = 64, file: str | None = None, size: int = 100_000) -> tuple[list[Tensor], list[Tensor]]:
    """Return the bytes of a text file as int64 tokens, in pieces of ``length``: the last tenth is the test part.

    Without a ``file`` the text is ``size`` bytes of sums.
    """
    content = sums(size) if file is None else Path(file).expanduser().read_bytes()
    pieces = list(torch.tensor(list(content)).split(length))
    pieces = [piece for piece in pieces if len(piece) == length]
    tested = max(1, len(pieces) // 10)
    return pieces[:-tested], pieces[-tested:]


def sums(size: int) -> bytes:
    """Return lines such as "17+65=82"."""
    numbers = random.Random(0)
    lines = []
    while sum(map(len, lines)) < size:
        one, other = numbers.randrange(100), numbers.randrange(100)
        lines.append(f"{one}+{other}={one + other}\n")
    return "".join(lines).encode()[:size]


def gpt2(width: int = 64, layers: int = 2, heads: int = 4, length: int = 64) -> nn.Module:
    """Return a GPT-2 for the 256 bytes, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 256, "n_positions": length, "n_embd": width, "n_layer": layers, "n_head": heads}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, use_cache=False))


class NextToken:
    """Cross-entropy and perplexity, over logits [batch, length, vocabulary] and the tokens [batch, length] themselves.

    The data yields tokens alone, so that they are the inputs and the targets.
    """

    metric = "test_perplexity"
    better = "lower"

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of every token but the first, in nats."""
        return functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())

    def new_totals(self, device: torch.device) -> Tensor:
        """Return zeros [2]: loss times tokens, tokens."""
        return torch.zeros(2, device=device)

    def update(self, totals: Tensor, outputs: Any, targets: Tensor, loss: Tensor) -> None:
        """Add a batch."""
        tokens = targets[:, 1:].numel()
        totals[0] += loss.detach() * tokens
        totals[1] += tokens

    def results(self, totals: Tensor) -> dict[str, float]:
        """Return the mean loss, and its exponential."""
        summed, tokens = totals.tolist()
        mean = summed / max(tokens, 1)
        return {"loss": mean, "perplexity": math.exp(min(mean, 700))}
