"""Preparation of images against image-by-image arithmetic."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from neq_cli.training.transforms import Preparation, crop_and_mirror, drawn_from


def pictures(batch: int = 6, channels: int = 3, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


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
    torch.testing.assert_close(out, expected.float())


def test_floats_are_taken_as_they_are() -> None:
    images = torch.rand(2, 1, 4, 4)
    assert torch.equal(Preparation().test(images), images)


def test_crop_pads_an_eighth_and_cifar_four() -> None:
    images, chances = pictures(height=16, width=16), draws(6)
    crop = Preparation(augment="crop").train(images, chances)
    cifar = Preparation(augment="cifar").train(images, chances)
    torch.testing.assert_close(crop, crop_and_mirror(images, chances, padding=2, mirror=False).float() / 255)
    torch.testing.assert_close(cifar, crop_and_mirror(images, chances, padding=4, mirror=True).float() / 255)
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
    torch.testing.assert_close(out, scaled[..., 5:15].float() / 255)


def test_imagenet_tests_scale_to_256_and_cut_224() -> None:
    preparation = Preparation(augment="imagenet")
    assert preparation.size == 224
    images = pictures(1, height=300, width=300)
    scaled = functional.resize(images, [256, 256], antialias=True)
    torch.testing.assert_close(preparation.test(images), scaled[..., 16:240, 16:240].float() / 255)
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
