"""A recipe made ready to start, and its FLOPs counted without starting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neq_cli.errors import RecipeError
from neq_cli.freezing.backward.sliced import MODES
from neq_cli.recipe import Recipe, StochasticPolicy
from neq_cli.recipe.load import dump_recipe, load_recipe
from neq_cli.training.estimate import estimate_flops
from neq_cli.training.policies import match
from neq_cli.training.sample import Sample
from neq_cli.training.session import prepare


def make_recipe(**changes: Any) -> Recipe:
    values = {
        "model": {"name": "resnet8", "kwargs": {"num_classes": 10, "in_channels": 1, "width": 4}},
        "data": {"name": "digits", "workers": 0},
        "epochs": 2,
        "batch_size": 64,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "device": "cpu",
    }
    return Recipe.model_validate(values | changes)


def test_a_session_says_what_it_is() -> None:
    session = prepare(make_recipe(), "small")
    started = session.started
    assert started.recipe_name == "small"
    assert started.description == "resnet8 on digits"
    assert started.policy == "neq epsilon=0.001 mu=0.5"
    assert started.epsilon == 0.001
    assert started.epochs == 2
    assert started.steps_per_epoch == 1388 // 64
    assert started.metric == "test_top1"
    assert dict(started.layers) == {name: len(mask) for name, mask in session.trainer.freezer.trainable.items()}
    assert started.layers["fc"] == 10
    assert "never frozen (output layer): fc" in started.notes
    assert "data.cache: memory, 0.46 MB" in started.notes
    assert (session.recipe.data.mean, session.recipe.data.std, session.recipe.data.channels) == ([0.3058], [0.3764], 1)
    assert session.found == ("data.channels", "data.mean", "data.std")
    assert session.data_content == {
        "name": "digits", "train": 1438, "test": 359, "classes": 10, "image_shape": [1, 8, 8],
        "mean": [0.3058], "std": [0.3764], "class_names": list("0123456789"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"kind": "baseline"}, "baseline"),
        ({"kind": "stochastic", "p": 0.25}, "stochastic p=0.25"),
        ({"kind": "stochastic", "p": "match:a/b", "matched_p": 0.5}, "stochastic p=0.5 (match:a/b)"),
        ({"kind": "neq", "definition": "reference"}, "neq epsilon=0.001 mu=0.5 definition=reference"),
    ],
)
def test_the_policy_in_words(policy: dict[str, Any], words: str) -> None:
    assert prepare(make_recipe(policy=policy), "small").started.policy == words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclude": ["nothing"]}, "exclude: 'nothing' matches no layer"),
        ({"batch_size": 1389}, "batch_size: 1389 images per step, but digits has 1388"),
        ({"data": {"name": "digits", "probe_size": 1438}}, "data.probe_size: 1438 probe images of 1438"),
        ({"policy": {"kind": "stochastic", "p": "match:a"}}, "policy.p: 'match:a' needs the run it names"),
    ],
)
def test_what_only_the_data_or_model_can_tell_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        prepare(make_recipe(**changes), "small")
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_seed_decides_the_weights() -> None:
    first = prepare(make_recipe(seed=5), "a").trainer.model.state_dict()
    torch.rand(3)
    again = prepare(make_recipe(seed=5), "b").trainer.model.state_dict()
    other = prepare(make_recipe(seed=6), "c").trainer.model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_matching_is_written_into_the_recipe_and_holds_without_the_other_run() -> None:
    policy = {"kind": "stochastic", "p": "match:a"}
    dense = estimate_flops(make_recipe(policy={"kind": "baseline"})).flops_paper
    matched = prepare(make_recipe(policy=policy, epochs=10), "small", 0.7 * dense)
    section = matched.recipe.policy
    assert isinstance(section, StochasticPolicy)
    assert section.p == "match:a"
    assert section.matched_p is not None
    again = prepare(matched.recipe, "small")  # no FLOPs given
    assert again.recipe == matched.recipe
    assert again.started.policy == matched.started.policy
    assert estimate_flops(matched.recipe).flops_paper == pytest.approx(0.7 * dense, rel=0.05)
    assert "matched_p: " in dump_recipe(matched.recipe)
    # The counts of two narrow layers move in steps, and how far beside the target they end is said.
    (note,) = [note for note in matched.started.notes if note.startswith("match:a")]
    reached = estimate_flops(matched.recipe).flops_paper
    beside = 100 * (reached / (0.7 * dense) - 1)
    assert f"p={section.matched_p:.4g} comes to {reached:.6g} mean paper FLOPs, {beside:+.2f}% beside the" in note
    assert matched.matched_flops == 0.7 * dense
    assert estimate_flops(make_recipe(policy=policy, epochs=10), 0.7 * dense).notes == [note]
    assert again.matched_flops is None
    assert not any(note.startswith("match:") for note in again.started.notes)


@pytest.mark.parametrize("flops", [0.0, 1e12, float("nan")])
def test_flops_of_another_model_are_refused(flops: float) -> None:
    recipe = make_recipe(policy={"kind": "stochastic", "p": "match:a"})
    with pytest.raises(
        RecipeError, match=r"^policy.p: 'match:a' has .* match a run of the same model on images of the same size$"
    ):
        match(recipe, prepare(make_recipe(), "small").trainer.model, Sample(torch.zeros(1, 1, 8, 8)), flops, 3)


def test_the_papers_numbers() -> None:
    def paper(*overrides: str) -> str:
        recipe = load_recipe("resnet32-cifar10", overrides).recipe
        return f"{estimate_flops(recipe).flops_paper / 1e6:.2f}M"

    assert paper() == "138.94M"
    assert paper("policy.kind=stochastic", "policy.p=0.2") == "112.99M"
    assert paper("policy.kind=stochastic", "policy.p=0.5") == "69.75M"


def test_an_estimate_sums_its_layers_and_agrees_with_training() -> None:
    estimate = estimate_flops(make_recipe())
    assert estimate.flops_paper == estimate.flops_paper_dense
    assert estimate.flops_paper == sum(layer["flops_paper"] for layer in estimate.layers.values())
    assert estimate.layers["fc"] == {
        "kind": "Linear", "neurons": 10, "flops_paper": 2 * 16 * 10, "flops_executed": 2 * 16 * 10
    }  # fmt: skip
    flops = prepare(make_recipe(), "small").trainer.freezer.flops()
    assert (flops.paper, flops.executed) == (estimate.flops_paper, estimate.flops_executed)


def test_the_backward_mode_of_a_recipe() -> None:
    """Only what is executed depends on it: a half is saved of each layer's weight gradients, or of everything."""
    policy = {"kind": "stochastic", "p": 0.5}
    estimates = {mode: estimate_flops(make_recipe(policy=policy, backward=mode)) for mode in MODES}
    assert len({estimate.flops_paper for estimate in estimates.values()}) == 1
    assert estimates["dense"].flops_executed == estimates["dense"].flops_executed_dense
    ratios = {mode: estimate.flops_executed / estimate.flops_executed_dense for mode, estimate in estimates.items()}
    # The first epoch of two trains everything, and the stem and the head have shares of their own.
    assert ratios["exact"] == pytest.approx((1 + 3 / 4) / 2, abs=0.02)
    assert ratios["truncated"] == pytest.approx((1 + 1 / 2) / 2, abs=0.02)

    assert prepare(make_recipe(), "small").trainer.freezer.backward == "exact"
    approximation = "backward: truncated is an approximation; frozen neurons pass no error to the layers below"
    for mode in MODES:
        session = prepare(make_recipe(backward=mode), "small")
        assert session.trainer.freezer.backward == mode
        assert (approximation in session.started.notes) == (mode == "truncated")


def test_an_estimate_needs_the_size_of_the_images() -> None:
    recipe = make_recipe(data={"name": "image_folder"}, model={"name": "resnet8"})
    with pytest.raises(RecipeError, match=r"^data.image_size: "):
        estimate_flops(recipe)
    assert estimate_flops(make_recipe(data={"name": "image_folder", "image_size": 32}, model={"name": "resnet8"}))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, (None, [0.3058], [0.3764], 1)),
        ({"mean": [0.5]}, (None, [0.5], [0.3764], 1)),
        ({"augment": "imagenet", "image_size": 12}, (12, [0.3058], [0.3764], 1)),
        ({"name": "FakeData", "kwargs": {"size": 60, "image_size": [1, 8, 8]}}, (None, [0.5], [0.5], 1)),
        ({"name": None, "entrypoint": "found_sets:bytes"}, (None, [0.5], [0.5], 1)),
        ({"name": None, "entrypoint": "found_sets:floats"}, (None, None, None, 1)),  # which come prepared
    ],
)
def test_a_recipe_is_resolved_to_what_images_are_prepared_by(
    data: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "found_sets.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def of(images): return [TensorDataset(images, torch.arange(99) % 10)] * 2\n"
        "def bytes(): return of(torch.full((99, 1, 8, 8), 51, dtype=torch.uint8))\n"
        "def floats(): return of(torch.full((99, 1, 8, 8), 0.2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plain = make_recipe(data={"name": "digits", "workers": 0, "probe_size": 20, **data}, batch_size=8)
    first = prepare(plain, "small")
    found = first.recipe.data
    assert (found.image_size, found.mean, found.std, found.channels) == expected
    # Trained by what was written it is the same run, which finds nothing any more.
    (tmp_path / "again.yaml").write_text(dump_recipe(first.recipe))
    again = prepare(load_recipe(str(tmp_path / "again.yaml")).recipe, "small")
    assert again.recipe == first.recipe
    assert again.found == ()
    assert again.data_content == first.data_content
    pairs = zip(first.trainer.loaders.probe, again.trainer.loaders.probe, strict=True)
    assert all(torch.equal(one[0], other[0]) for one, other in pairs)


def test_the_size_that_images_are_cut_to_is_written_out() -> None:
    data = {"name": "digits", "workers": 0, "augment": "imagenet"}
    recipe = prepare(make_recipe(data=data, batch_size=2, channels_last=False), "small").recipe
    assert recipe.data.image_size == 224
