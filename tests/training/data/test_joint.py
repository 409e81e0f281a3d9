"""Images and masks stay on top of each other, whatever is done to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neq_cli.training.data.masks import IGNORED, MaskPreparation

HEIGHT, WIDTH = 40, 60


def pair() -> tuple[Tensor, Tensor]:
    """Four areas of classes 1 to 4, painted in brightnesses that tell them: 50 for each."""
    mask = torch.ones(HEIGHT, WIDTH, dtype=torch.uint8)
    mask[:, 25:] = 2
    mask[15:, :] += 2
    return (mask * 50).expand(3, HEIGHT, WIDTH).clone(), mask


def agree(image: Tensor, mask: Tensor) -> float:
    """The share of pixels whose brightness is that of their class; padding is black and ignored."""
    expected = torch.where(mask == IGNORED, 0, mask.int() * 50)
    return float(((image[0].int() - expected).abs() < 13).float().mean())


@pytest.mark.parametrize("draw", range(20))
def test_both_are_scaled_mirrored_and_cut_alike(draw: int) -> None:
    preparation = MaskPreparation(32, "segmentation", base_size=36)
    image, mask = preparation.drawn(*pair(), draw)
    assert (image.shape, mask.shape) == ((3, 32, 32), (32, 32))
    assert (image.dtype, mask.dtype) == (torch.uint8, torch.uint8)
    assert type(image) is type(mask) is torch.Tensor
    assert set(mask.unique().tolist()) <= {1, 2, 3, 4, IGNORED}  # never between two classes
    assert agree(image, mask) > 0.88


def test_padding_lies_below_and_to_the_right_and_is_ignored() -> None:
    preparation = MaskPreparation(32, "segmentation", base_size=32)
    padded = [preparation.drawn(*pair(), draw) for draw in range(40)]
    small = [(image, mask) for image, mask in padded if (mask == IGNORED).any()]
    assert 5 < len(small) < 35
    for image, mask in small:
        rows = (mask != IGNORED).any(1)
        assert rows[: int(rows.sum())].all()
        assert not image[:, mask == IGNORED].any()


def test_the_draw_decides_and_nothing_else() -> None:
    preparation = MaskPreparation(24, "segmentation")
    state = torch.get_rng_state()
    first = preparation.drawn(*pair(), 7)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    again, other = preparation.drawn(*pair(), 7), preparation.drawn(*pair(), 8)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_scales_are_spread_from_half_to_twice() -> None:
    """A column of one pixel in 40 comes out as wide as the scale is."""
    preparation = MaskPreparation(None, "segmentation")
    shares = []
    for draw in range(300):
        image, mask = preparation.drawn(*pair(), draw)
        assert image.shape == (3, HEIGHT, WIDTH)
        shares.append(float((mask != IGNORED).float().mean()))
    below = sum(share < 0.999 for share in shares) / len(shares)
    assert 0.25 < below < 0.42  # scales below 1 are a third of 0.5 to 2
    assert min(shares) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("base", [None, 20, 40])
def test_tests_see_the_whole_image(base: int | None) -> None:
    preparation = MaskPreparation(base_size=base)
    image, mask = preparation.whole(*pair())
    side = base or HEIGHT
    assert image.shape == (3, side, side * WIDTH // HEIGHT) == (3, *mask.shape)
    assert tuple(mask.shape) == preparation.whole_size(HEIGHT, WIDTH)
    assert agree(image, mask) > 0.9


@pytest.mark.parametrize(("height", "width"), [(333, 500), (500, 333), (427, 640), (17, 17), (3, 100)])
def test_the_size_is_known_beforehand(height: int, width: int) -> None:
    preparation = MaskPreparation(image_size=52)
    image, _ = preparation.whole(
        torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(height, width, dtype=torch.uint8)
    )
    assert tuple(image.shape[1:]) == preparation.whole_size(height, width)


def test_what_is_probed_is_the_middle() -> None:
    image, mask = MaskPreparation(20, base_size=40).cut(*pair())
    assert torch.equal(mask, pair()[1][10:30, 20:40])
    assert torch.equal(image, pair()[0][:, 10:30, 20:40])
