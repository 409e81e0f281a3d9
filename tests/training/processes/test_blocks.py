"""Which modules are blocks: found in models of the libraries, named by globs, and refused where they cannot be."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from neq_cli.errors import RecipeValueError
from neq_cli.training.processes.blocks import blocks_of


class Block(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.up, self.inner = nn.Linear(2, 2), nn.ModuleList(inner)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class Tied(nn.Module):
    def __init__(self, within: bool) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(2, 2)
        if within:
            self.blocks[1].up.weight = self.head.weight
        else:
            self.embedding = nn.Linear(2, 2)
            self.embedding.weight = self.head.weight


@pytest.mark.parametrize(
    ("name", "kind", "count", "first"),
    [
        ("vit_b_16", "EncoderBlock", 12, "encoder.layers.encoder_layer_0"),
        ("resnet50", "Bottleneck", 3 + 4 + 6 + 3, "layer1.0"),
        ("resnet18", "BasicBlock", 2 * 4, "layer1.0"),
        ("swin_t", "SwinTransformerBlock", 2 + 2 + 6 + 2, "features.1.0"),
        ("convnext_tiny", "CNBlock", 3 + 3 + 9 + 3, "features.1.0"),
        ("mobilenet_v2", "InvertedResidual", 17, "features.1"),
        ("efficientnet_b0", "MBConv", 16, "features.1.0"),
    ],
)
def test_repeated_blocks_of_torchvisions_models(name: str, kind: str, count: int, first: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None)
    found = blocks_of(model, None)
    assert {type(module).__name__ for module in found.values()} == {kind}
    assert len(found) == count
    assert next(iter(found)) == first
    assert all(model.get_submodule(name) is module for name, module in found.items())


def test_models_of_other_libraries() -> None:
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    swin = timm.create_model("swin_tiny_patch4_window7_224")
    with torch.device("meta"):
        both = transformers.BartModel(transformers.BartConfig(encoder_layers=2, decoder_layers=2))
    assert len(blocks_of(swin, None)) == 12
    assert {type(module).__name__ for module in blocks_of(both, None).values()} == {
        "BartEncoderLayer",
        "BartDecoderLayer",
    }


def test_experts_of_a_block_are_none() -> None:
    # Of eight experts each process may run others, and would wait for weights that nobody else gathers.
    model = nn.Sequential(nn.ModuleList([Block(*(Expert() for _ in range(4))), Block(*(Expert() for _ in range(4)))]))
    assert list(blocks_of(model, None)) == ["0.0", "0.1"]


def test_where_nothing_repeats_there_are_none() -> None:
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None) == {}


def test_globs_outer_ones_first() -> None:
    model = nn.Sequential(nn.ModuleList([Block(), Block()]), nn.Linear(2, 2))
    assert list(blocks_of(model, ["0.1.*", "0.*"])) == ["0.0", "0.0.up", "0.1", "0.1.up"]  # no empty list of modules
    assert list(blocks_of(model, ["1"])) == ["1"]


@pytest.mark.parametrize(
    ("glob", "mend"), [("blocks", "did you mean 'blocks.1'?"), ("xyz", "; names are such as 'blocks.0'"), ("", "")]
)
def test_a_glob_that_matches_no_block_is_named(glob: str, mend: str) -> None:
    with pytest.raises(RecipeValueError) as caught:
        blocks_of(Tied(False), [glob])
    assert caught.value.key == "fsdp.blocks"
    assert caught.value.reason.startswith(f"no module with weights and a forward pass matches '{glob}'")
    assert mend in caught.value.reason


def test_a_weight_is_in_one_unit() -> None:
    assert list(blocks_of(Tied(False), None)) == ["blocks.0", "blocks.1"]  # shared by what is in no block
    assert blocks_of(Tied(True), None) == {}
    with pytest.raises(RecipeValueError) as caught:
        blocks_of(Tied(True), ["blocks.*"])
    assert "'blocks.1.up.weight' and 'head.weight' are one weight, which would be in two units" in caught.value.reason
    assert list(blocks_of(Tied(True), ["blocks.0"])) == ["blocks.0"]
