"""The paper's FLOPs of real architectures are those of arithmetic written out: 2 a multiply-add, 4 a norm's element."""

from __future__ import annotations

from itertools import pairwise

import pytest
from architectures.table import CASES, draw, freezer_of, make


def macs(positions: int, *widths: int) -> int:
    """Return the multiply-adds of linear layers one after another, on so many positions."""
    return positions * sum(before * after for before, after in pairwise(widths))


def torch_lstm() -> int:
    """6 words; 4 gates of 12 units, of 8 inputs and 12 units; 40 words to choose from. Lookups cost nothing."""
    return 2 * (6 * 4 * 12 * (8 + 12) + 6 * 12 * 40)


def torch_lstm_projected() -> int:
    """As the LSTM, but that 12 units put out 5 features, two layers both ways: 2 x 5 features to the second."""
    first, second = (6 * 4 * 12 * (inputs + 5) + macs(6, 12, 5) for inputs in (8, 2 * 5))
    return 2 * (2 * first + 2 * second + macs(6, 2 * 5, 40))


def torch_transformer() -> int:
    """5 words in, 4 out, 16 features, 32 within, two layers each, norms after both of them too."""
    encoder = 2 * (macs(5, 16, 3 * 16) + macs(5, 16, 16) + macs(5, 16, 32, 16))
    own, crossed = macs(4, 16, 3 * 16) + macs(4, 16, 16), macs(4 + 5 + 5, 16, 16) + macs(4, 16, 16)
    decoder = 2 * (own + crossed + macs(4, 16, 32, 16))
    norms = 2 * 2 * 5 * 16 + 2 * 3 * 4 * 16 + 5 * 16 + 4 * 16
    return 2 * (encoder + decoder + macs(4, 16, 30)) + 4 * norms


def torchvision_vit() -> int:
    """16 patches of 8 x 8 x 3 and the class token, 48 features, 96 within, two blocks; the head sees one token."""
    block = macs(17, 48, 3 * 48) + macs(17, 48, 48) + macs(17, 48, 96, 48)
    return 2 * (macs(16, 8 * 8 * 3, 48) + 2 * block + macs(1, 48, 5)) + 4 * (2 * 2 * 17 * 48 + 17 * 48)


def torchvision_convnext() -> int:
    """Four stages of one block on 8 x 8, 4 x 4, 2 x 2 and one pixel: 7 x 7 by channel, then four times as wide."""
    total = 2 * macs(64, 4 * 4 * 3, 8) + 4 * 64 * 8  # the stem and its norm
    for width, after, pixels in ((8, 12, 64), (12, 16, 16), (16, 24, 4), (24, 0, 1)):
        total += 2 * (pixels * width * 7 * 7 + macs(pixels, width, 4 * width, width))
        total += 4 * (pixels * width + pixels * width)  # the norm and the layer's scale
        if after:  # a norm, and 2 x 2 pixels into one
            total += 4 * pixels * width + 2 * macs(pixels // 4, 2 * 2 * width, after)
    return total + 4 * 24 + 2 * macs(1, 24, 5)


def timm_vit() -> int:
    """16 patches and the class token, 48 features, four times as many within, two blocks."""
    block = macs(17, 48, 3 * 48) + macs(17, 48, 48) + macs(17, 48, 192, 48)
    return 2 * (macs(16, 8 * 8 * 3, 48) + 2 * block + macs(1, 48, 5)) + 4 * (2 * 2 * 17 * 48 + 17 * 48)


def timm_beit() -> int:
    """As the ViT, but for two scales in each block, and a norm of the patches' mean in the place of all tokens'."""
    block = macs(17, 48, 3 * 48) + macs(17, 48, 48) + macs(17, 48, 192, 48)
    norms, scales = 2 * 2 * 17 * 48 + 48, 2 * 2 * 17 * 48
    return 2 * (macs(16, 8 * 8 * 3, 48) + 2 * block + macs(1, 48, 5)) + 4 * (norms + scales)


def transformers_bert() -> int:
    """6 words of 16 features, 32 within, two layers; the pooler and two classes see the first word."""
    layer = macs(6, 16, 3 * 16) + macs(6, 16, 16) + macs(6, 16, 32, 16)
    return 2 * (2 * layer + macs(1, 16, 16, 2)) + 4 * (6 * 16 + 2 * 2 * 6 * 16)


def _attention() -> int:
    """Two heads of 8 for the queries, one for keys and values."""
    return macs(6, 16, 16 + 8 + 8) + macs(6, 16, 16)


def transformers_llama() -> int:
    """6 words of 16 features; gate and up to 32, and down; RMS norms before both parts and at the end."""
    layer = _attention() + macs(6, 16, 2 * 32) + macs(6, 32, 16)
    return 2 * (2 * layer + macs(6, 16, 40)) + 4 * (2 * 2 * 6 * 16 + 6 * 16)


def transformers_mixtral() -> int:
    """As Llama, but that each word goes to two of four experts, which a router chooses."""
    experts = 2 * (macs(6, 16, 2 * 32) + macs(6, 32, 16))
    layer = _attention() + macs(6, 16, 4) + experts
    return 2 * (2 * layer + macs(6, 16, 40)) + 4 * (2 * 2 * 6 * 16 + 6 * 16)


def transformers_mamba() -> int:
    """6 words; 32 channels, each with a state of 4, and a time step of one feature; two blocks.

    The convolution goes 4 steps back, over 3 more on each side. A_log and D scale: states by words, and channels.
    """
    maps = macs(6, 16, 2 * 32) + 9 * 32 * 4 + macs(6, 32, 1 + 2 * 4) + macs(6, 1, 32) + macs(6, 32, 16)
    scales = 6 * 16 + 6 * 32 * 4 + 6 * 32  # the norm before them, too
    return 2 * (2 * maps + macs(6, 16, 40)) + 4 * (2 * scales + 6 * 16)


def transformers_gpt2() -> int:
    """6 words of 16 features, 64 within; its maps are stored by their inputs, and cost what others do."""
    layer = macs(6, 16, 3 * 16) + macs(6, 16, 16) + macs(6, 16, 64, 16)
    return 2 * (2 * layer + macs(6, 16, 40)) + 4 * (2 * 2 * 6 * 16 + 6 * 16)


def _resnet(pixels: int, inputs: int, outputs: int) -> int:
    """A residual block of diffusers: norm, 3 x 3, the time from 32 features, norm, 3 x 3; 1 x 1 beside where wider."""
    beside = macs(pixels, inputs, outputs) if inputs != outputs else 0
    maps = macs(pixels, 9 * inputs, outputs) + macs(1, 32, outputs) + macs(pixels, 9 * outputs, outputs) + beside
    return 2 * maps + 4 * pixels * (inputs + outputs)


def _attended(pixels: int) -> int:
    """Attention of diffusers on 16 channels: a norm, queries, keys and values, and what puts them together."""
    return 4 * pixels * 16 + 2 * (macs(pixels, 16, 3 * 16) + macs(pixels, 16, 16))


def diffusers_unet() -> int:
    """16 x 16 pixels with 8 channels, 8 x 8 with 16; one block a level going down, two going up, two in the middle."""
    total = 2 * (macs(256, 9 * 3, 8) + macs(1, 8, 32, 32))  # the first convolution; the time's own layers
    total += _resnet(256, 8, 8) + 2 * macs(64, 9 * 8, 8)  # and every second pixel
    total += _resnet(64, 8, 16) + _attended(64)
    total += 2 * _resnet(64, 16, 16) + _attended(64)
    total += _resnet(64, 16 + 16, 16) + _resnet(64, 16 + 8, 16) + 2 * _attended(64)
    total += 2 * macs(256, 9 * 16, 16)  # twice as large again
    total += _resnet(256, 16 + 8, 8) + _resnet(256, 8 + 8, 8)
    return total + 4 * 256 * 8 + 2 * macs(256, 9 * 8, 3)


def _transformer(pixels: int) -> int:
    """Of diffusers, on 16 channels: a norm and 1 x 1 before, 1 x 1 after; between them attention, attention on 5 words
    of 12 features, and a gated layer of 64, with a norm before each."""
    own = macs(pixels, 16, 3 * 16) + macs(pixels, 16, 16)
    crossed = macs(pixels, 16, 16) + macs(5, 12, 2 * 16) + macs(pixels, 16, 16)
    gated = macs(pixels, 16, 2 * 64) + macs(pixels, 64, 16)
    return 2 * (2 * macs(pixels, 16, 16) + own + crossed + gated) + 4 * 4 * pixels * 16


def diffusers_conditional_unet() -> int:
    """As the other, of 4 channels, with transformers where that has attention."""
    total = 2 * (macs(256, 9 * 4, 8) + macs(1, 8, 32, 32))
    total += _resnet(256, 8, 8) + 2 * macs(64, 9 * 8, 8)
    total += _resnet(64, 8, 16) + _transformer(64)
    total += 2 * _resnet(64, 16, 16) + _transformer(64)
    total += _resnet(64, 16 + 16, 16) + _resnet(64, 16 + 8, 16) + 2 * _transformer(64)
    total += 2 * macs(256, 9 * 16, 16)
    total += _resnet(256, 16 + 8, 8) + _resnet(256, 8 + 8, 8)
    return total + 4 * 256 * 8 + 2 * macs(256, 9 * 8, 4)


BY_HAND = {
    "torch-lstm": torch_lstm,
    "torch-lstm-both-ways-two-layers-projected": torch_lstm_projected,
    "torch-transformer": torch_transformer,
    "torchvision-vit": torchvision_vit,
    "torchvision-convnext": torchvision_convnext,
    "timm-vit_tiny_patch16_224": timm_vit,
    "timm-beit_base_patch16_224": timm_beit,
    "transformers-bert": transformers_bert,
    "transformers-llama": transformers_llama,
    "transformers-mixtral": transformers_mixtral,
    "transformers-mamba": transformers_mamba,
    "transformers-gpt2": transformers_gpt2,
    "diffusers-UNet2DModel": diffusers_unet,
    "diffusers-UNet2DConditionModel": diffusers_conditional_unet,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BY_HAND)
def test_the_papers_flops_are_those_by_hand(name: str) -> None:
    case = CASES[name]
    freezer = freezer_of(case, make(case), draw(case))
    flops = freezer.flops()
    assert flops.paper_dense == flops.paper == BY_HAND[name]()
    freezer.step()
    halved = freezer.flops()
    assert halved.paper_dense == flops.paper
    assert halved.paper == pytest.approx(
        sum(
            flops.layers[layer].paper * float(trainable.double().mean())
            for layer, trainable in freezer.trainable.items()
        )
    )
    assert halved.paper < 0.8 * flops.paper
