"""Preparation of images against image-by-image arithmetic."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from rounding import apart
from torch import Tensor
from torchvision.transforms.v2 import functional

from neq_cli.recipe.values import Augment
from neq_cli.training.data import transforms
from neq_cli.training.data.transforms import Mixing, Preparation, crop_and_mirror, drawn_from, erased


def pictures(batch: int = 6, channels: int = 3, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


# A byte divided by 255, or multiplied by what 1 / 255 is rounded to.
SCALED = {"rtol": apart(2, torch.float32), "atol": 0.0}


def draws(count: int, seed: int = 0) -> Tensor:
    return torch.randint(2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def placed(image: Tensor, row: int, column: int, padding: int, mirrored: bool) -> Tensor:
    """One padded and cropped image, pixel by pixel: what lies outside is 0."""
    height, width = image.shape[1:]
    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            from_y, from_x = y + row - padding, x + column - padding
            if 0 <= from_y < height and 0 <= from_x < width:
                out[:, y, (width - 1 - x) if mirrored else x] = image[:, from_y, from_x]
    return out


@pytest.mark.parametrize(("padding", "mirror"), [(1, False), (4, True)])
def test_each_image_is_cropped_and_mirrored_by_its_own_draw(padding: int, mirror: bool) -> None:
    images, chances = pictures(), draws(6)
    out = crop_and_mirror(images, chances, padding=padding, mirror=mirror)
    places = 2 * padding + 1
    for image, draw, result in zip(images, chances.tolist(), out, strict=True):
        mirrored = mirror and bool(draw // 2**32 % 2)
        assert torch.equal(result, placed(image, draw % places, draw // 2**16 % places, padding, mirrored))


def one_by_one(images: Tensor, chances: Tensor, *, padding: int, mirror: bool) -> Tensor:
    """The augmentation as a loop over images."""
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    cropped = torch.empty_like(images)
    for index, draw in enumerate(chances.tolist()):
        row, column = draw % (2 * padding + 1), (draw >> 16) % (2 * padding + 1)
        cut = padded[index, :, row : row + height, column : column + width]
        cropped[index] = cut.flip(-1) if mirror and (draw >> 32) & 1 else cut
    return cropped


@pytest.mark.parametrize("device", ["cpu", "other"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("shape", "padding", "mirror"),
    [
        ((100, 3, 32, 32), 4, True),
        ((64, 1, 8, 8), 1, False),
        ((5, 3, 224, 224), 28, False),
        ((7, 2, 5, 9), 4, True),  # padded by nearly its height
        ((6, 4, 7, 4), 0, False),  # "crop" pads small images by nothing
        ((1, 3, 6, 6), 4, True),
    ],
)
def test_a_batch_is_cut_as_a_loop_would_cut_it(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    padding: int,
    mirror: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    if device == "other":  # what accelerators run
        monkeypatch.setattr(transforms, "_windows", transforms._gathered)
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = images.clone()
    for seed in range(3):
        chances = draws(shape[0], seed)
        expected = one_by_one(images, chances, padding=padding, mirror=mirror)
        assert torch.equal(crop_and_mirror(images, chances, padding=padding, mirror=mirror), expected)
        strided = images.contiguous(memory_format=torch.channels_last)
        assert torch.equal(crop_and_mirror(strided, chances, padding=padding, mirror=mirror), expected)
    assert torch.equal(images, before)


def test_normalising_leaves_its_input_alone() -> None:
    images = torch.rand(2, 1, 4, 4)
    before = images.clone()
    out = Preparation(mean=(0.5,), std=(0.25,)).finished(images)
    torch.testing.assert_close(out, (before - 0.5) * 4, rtol=0, atol=apart(3, torch.float32, magnitude=6))
    assert torch.equal(images, before)


@pytest.mark.parametrize("augment", ["none", "crop", "cifar", "imagenet"])
def test_the_three_steps_make_the_whole(augment: str) -> None:
    preparation = Preparation(8, augment, (0.5,) * 3, (0.2,) * 3)  # type: ignore[arg-type]
    images, chances = pictures(height=12, width=10), draws(6)
    kept = preparation.fixed(images, augmented=True)
    assert kept.shape[-2:] == ((12, 10) if augment == "imagenet" else (8, 8))
    assert kept.dtype == torch.uint8
    assert torch.equal(preparation.finished(preparation.varied(kept, chances)), preparation.train(images, chances))
    kept = preparation.fixed(images, augmented=False)
    assert kept.shape[-2:] == (8, 8)
    assert torch.equal(preparation.finished(kept), preparation.test(images))


def test_places_and_mirrors_are_even_and_independent() -> None:
    drawn = Counter((draw % 9, draw // 2**16 % 9, draw // 2**32 % 2) for draw in draws(81 * 2 * 400, seed=3).tolist())
    assert len(drawn) == 162
    # Pearson's chi-squared with 161 degrees of freedom: mean 161, deviation 18; 250 is five deviations away.
    assert sum((count - 400) ** 2 / 400 for count in drawn.values()) < 250


def test_pixels_are_scaled_to_one_and_normalised_by_channel() -> None:
    images = pictures()
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    out = Preparation(mean=mean, std=std).test(images)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    # Scaled to one, less at most 0.3, divided by at least 0.5; what they are divided by or added is rounded itself.
    torch.testing.assert_close(out, expected.float(), rtol=0, atol=apart(6, torch.float32, magnitude=2.6))


def test_floats_are_taken_as_they_are() -> None:
    images = torch.rand(2, 1, 4, 4)
    assert torch.equal(Preparation().test(images), images)


def test_crop_pads_an_eighth_and_cifar_four() -> None:
    images, chances = pictures(height=16, width=16), draws(6)
    crop = Preparation(augment="crop").train(images, chances)
    cifar = Preparation(augment="cifar").train(images, chances)
    torch.testing.assert_close(crop, crop_and_mirror(images, chances, padding=2, mirror=False).float() / 255, **SCALED)
    torch.testing.assert_close(cifar, crop_and_mirror(images, chances, padding=4, mirror=True).float() / 255, **SCALED)
    assert not torch.equal(crop, cifar)


@pytest.mark.parametrize("augment", ["none", "crop", "cifar", "imagenet"])
def test_tests_are_never_augmented(augment: str) -> None:
    preparation = Preparation(image_size=8, augment=augment)  # type: ignore[arg-type]
    images = pictures(height=12, width=10)
    state = torch.get_rng_state()
    assert torch.equal(preparation.test(images), preparation.test(images))
    assert torch.equal(state, torch.get_rng_state())


def test_images_are_scaled_by_their_shorter_side_and_cut_in_the_middle() -> None:
    images = pictures(height=20, width=40)
    out = Preparation(image_size=10).test(images)
    scaled = functional.resize(images, [10, 20], antialias=True)
    torch.testing.assert_close(out, scaled[..., 5:15].float() / 255, **SCALED)


def test_imagenet_tests_scale_to_256_and_cut_224() -> None:
    preparation = Preparation(augment="imagenet")
    assert preparation.size == 224
    images = pictures(1, height=300, width=300)
    scaled = functional.resize(images, [256, 256], antialias=True)
    torch.testing.assert_close(preparation.test(images), scaled[..., 16:240, 16:240].float() / 255, **SCALED)
    assert Preparation(image_size=64, augment="imagenet").test(images).shape == (1, 3, 64, 64)


def test_imagenet_training_follows_the_draws_alone() -> None:
    preparation = Preparation(image_size=16, augment="imagenet")
    images, chances = pictures(4, height=30, width=20), draws(4)
    torch.manual_seed(1)
    first = preparation.train(images, chances)
    torch.manual_seed(2)
    second = preparation.train(images, chances)
    alone = torch.cat([preparation.train(images[i : i + 1], chances[i : i + 1]) for i in range(4)])
    assert first.shape == (4, 3, 16, 16)
    assert torch.equal(first, second)
    assert torch.equal(first, alone)
    assert not torch.equal(first, preparation.train(images, draws(4, seed=9)))


def test_a_draw_does_not_touch_the_global_generator() -> None:
    state = torch.get_rng_state()
    with drawn_from(5):
        first = torch.rand(3)
    with drawn_from(5):
        assert torch.equal(first, torch.rand(3))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("augment", ["imagenet", "randaugment"])
def test_what_scales_at_random_follows_from_the_draw(augment: Augment) -> None:
    images = torch.randint(0, 256, (4, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    preparation = Preparation(24, augment, interpolation="bicubic")
    decided = torch.tensor([3, 2**40 + 1, 7, 7])
    first = preparation.train(images, decided)
    torch.manual_seed(99)
    assert first.shape == (4, 3, 24, 24)
    assert torch.equal(first, preparation.train(images, decided))
    assert torch.equal(first[1], preparation.train(images[1:2], decided[1:2])[0])
    assert preparation.test(images).shape == (4, 3, 24, 24)


def test_randaugment_changes_more_than_the_cut() -> None:
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names: tuple[Augment, ...] = ("imagenet", "randaugment")
    plain, varied = (Preparation(24, name).train(images, torch.arange(30)) for name in names)
    changed = (plain != varied).flatten(1).any(1).float().mean()
    assert 0.7 < changed <= 1  # of 14 operations one is none, and some change nothing here


def test_an_erased_part_is_noise_in_a_share_of_the_images() -> None:
    images, decided = torch.zeros(400, 3, 16, 16), list(range(400))
    changed = erased(images, decided, 0.25)
    touched = changed.flatten(1).any(1)
    assert 0.18 < touched.float().mean() < 0.32
    values = changed[touched]
    values = values[values != 0]
    assert abs(float(values.mean())) < 0.05
    assert abs(float(values.std()) - 1) < 0.05
    assert torch.equal(changed, erased(images, decided, 0.25))
    assert not erased(images, decided, 0.0).any()


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_are_the_shares_of_mixed_images(mixup: float, cutmix: float) -> None:
    """Image k is filled with k: the mean of a mixed one tells how much of which it is made of."""
    labels = torch.tensor([0, 1, 2, 3])
    images = labels.float().view(4, 1, 1, 1).expand(4, 1, 16, 16)
    ways = set()
    for draw in range(30):
        mixed, shares = Mixing(mixup, cutmix, 5).mixed(images, labels, draw)
        assert shares.shape == (4, 5)
        torch.testing.assert_close(shares.sum(1), torch.ones(4), rtol=apart(6, torch.float32), atol=0)
        close = apart(256 + 8, torch.float32, magnitude=4)  # a mean of 256 pixels of 3 at most
        torch.testing.assert_close(mixed.mean((1, 2, 3)), shares @ torch.arange(5.0), rtol=0, atol=close)
        if len(mixed[1].unique()) > 1:
            ways.add("cut")
        if (mixed[1] % 1).any():
            ways.add("blend")
        again, _ = Mixing(mixup, cutmix, 5).mixed(images, labels, draw)
        assert torch.equal(mixed, again)
    assert ways == ({"cut"} if cutmix else set()) | ({"blend"} if mixup else set())
