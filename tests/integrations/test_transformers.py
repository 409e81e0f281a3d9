"""NEqCallback in transformers' Trainer: the sets of a loop by hand, exact resume, refusals in one line."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frozen import Sets
from torch import Tensor, nn

from neq_cli import Baseline, Freezer, NEq, read_run
from neq_cli.errors import FreezingError, NeqError, RunDirectoryError
from neq_cli.freezing.backward.dispatch import Dispatch

pytest.importorskip("transformers", reason="no transformers")
pytest.importorskip("accelerate", reason="no accelerate, which Trainer needs")

import transformers
from integrations.transformers_trainings import (
    Stops,
    arguments,
    assert_same,
    callback,
    model,
    recorded,
    rows,
    run_program,
    trainer,
)
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from neq_cli.integrations.trainer_arguments import judged_by
from neq_cli.integrations.trainer_rows import evaluated, train_loss
from neq_cli.integrations.transformers import NEqCallback

FROM_5 = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="it refuses fp16 on a CPU")


class ByHand(TrainerCallback):
    """A Freezer as a loop of one's own would have it: made before the first step, asked after each epoch."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        held_out = [{key: row[key] for key in ("input_ids", "labels")} for row in rows(10, seed=9)]
        batches = [default_data_collator(held_out[:8]), default_data_collator(held_out[8:])]
        options = {"policy": NEq(0.02), "dispatch": Dispatch(fixed=True)}
        self.freezer = Freezer(kwargs["model"], kwargs["optimizer"].optimizer, batches, **options)
        self.seen: list[dict[str, Any]] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self.freezer.step())


class Watches(TrainerCallback):
    """Keeps the weights after every optimiser step, and what is frozen then; stands behind the callback it watches."""

    def __init__(self, watched: NEqCallback) -> None:
        self.watched = watched
        self.steps: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.watched.freezer is not None
        weights = {name: tensor.detach().clone() for name, tensor in self.watched.freezer.model.named_parameters()}
        self.steps.append((self.watched.freezer.epoch, weights, dict(self.watched.freezer.trainable)))


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def all_of(made: Trainer, own: NEqCallback, folder: Path) -> dict[str, Any]:
    """Return what a training came to: weights, optimiser, dynamics, the log, and the run directory."""
    seen = {name: (one.phi, one.delta_phi, one.velocity, one.trainable) for name, one in own.observations.items()}
    timed = ("_runtime", "_per_second")
    log = [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in made.state.log_history]
    return {
        "weights": weights(made.model), "optimizer": made.optimizer.state_dict(), "seen": seen,
        "log": [entry for entry in log if "total_flos" not in entry], "run": recorded(folder / "run"),
    }  # fmt: skip


def test_it_freezes_what_a_loop_by_hand_does(tmp_path: Path) -> None:
    by_hand, own = ByHand(), callback()
    expected = trainer(tmp_path / "hand", by_hand)
    expected.train()
    found = trainer(tmp_path / "own", own)
    found.train()
    assert own.observations.keys() == by_hand.seen[-1].keys()
    for name, seen in by_hand.seen[-1].items():
        assert torch.equal(own.observations[name].trainable, seen.trainable), name
        assert torch.equal(own.observations[name].velocity, seen.velocity), name
    assert any((~seen.trainable).any() for seen in own.observations.values()), "nothing froze: the test tells nothing"
    assert_same(weights(found.model), weights(expected.model))


def test_a_trainer_that_freezes_nothing_trains_as_without(tmp_path: Path) -> None:
    """The probe draws (a collator that masks words), and nobody's random numbers move."""

    def masked(found: list[dict[str, Any]]) -> Any:
        batch = default_data_collator(found)
        return {**batch, "input_ids": batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.2, 1)}

    made = []
    for callbacks in ([], [callback(policy=Baseline())]):
        made.append(trainer(tmp_path, *callbacks))  # which sows the random numbers
        made[-1].data_collator = masked
        made[-1].train()
    plain, watched = made
    assert_same(weights(watched.model), weights(plain.model))
    assert_same(watched.optimizer.state_dict(), plain.optimizer.state_dict())
    assert not any(type(module).__module__.startswith("neq_cli") for module in watched.model.modules())


def test_rows_tell_what_the_trainer_logged(tmp_path: Path) -> None:
    own = callback(run_directory=tmp_path / "run", policy=Sets(0.5))
    made = trainer(tmp_path, own, eval_strategy="epoch", logging_steps=2)
    made.train()
    run = read_run(tmp_path / "run")
    log = made.state.log_history
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    assert run.metrics["step"].tolist() == [6, 12, 18]
    assert run.metrics["passed_epochs"].tolist() == [1, 2, 3]
    expected = [(losses[end - 4] + losses[end - 2] + losses[end]) / 3 for end in (6, 12, 18)]
    np.testing.assert_allclose(run.metrics["train_loss"], expected, rtol=1e-12)
    assert run.metrics["eval_loss"].tolist() == [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    # A linear schedule to nothing in 18 steps: steps 6, 12 and 18 are made with what 5, 11 and 17 leave.
    np.testing.assert_allclose(run.metrics["lr"], [3e-3 * (18 - done) / 18 for done in (5, 11, 17)], rtol=1e-12)
    assert (run.metric, run.lower_is_better) == ("eval_loss", True)
    assert (np.asarray(run.metrics["frozen"]) > 0).tolist() == [False, True, True]


def test_rows_of_steps_wait_for_the_end_of_their_epoch(tmp_path: Path) -> None:
    own = callback(run_directory=tmp_path / "run", every=4, metric="eval_right", columns=["eval_right"])
    made = trainer(tmp_path, own, eval_strategy="epoch")
    made.compute_metrics = lambda told: {"right": float((told.predictions.argmax(1) == told.label_ids).mean())}
    made.train()
    run = read_run(tmp_path / "run")
    assert run.metrics["step"].tolist() == [4, 8, 12, 16]
    np.testing.assert_allclose(run.metrics["passed_epochs"], [4 / 6, 8 / 6, 2, 16 / 6])
    assert run.unit == "observation"
    right = {entry["step"]: entry["eval_right"] for entry in made.state.log_history if "eval_right" in entry}
    # The evaluation at step 6 is the news of the row of step 8, that at 12 of its own.
    np.testing.assert_array_equal(run.metrics["eval_right"], [np.nan, right[6], right[12], np.nan])
    assert (run.metric, run.lower_is_better) == ("eval_right", False)


def test_what_evaluation_tells_late_is_noted(tmp_path: Path) -> None:
    own = callback(run_directory=tmp_path / "run", every=2)
    made = trainer(tmp_path, own, max_steps=6, eval_strategy="steps", eval_steps=4)
    made.compute_metrics = lambda told: {"right": 1.0}
    made.train()
    assert "eval_right" not in read_run(tmp_path / "run").metrics
    notes = json.loads((tmp_path / "run" / "environment.json").read_text())["notes"]
    assert sum("eval_right: first told at step 4" in note for note in notes) == 1


def test_losses_are_weighed_by_their_steps() -> None:
    log = [
        {"step": 1, "loss": 9.0}, {"step": 4, "loss": 1.0}, {"step": 6, "loss": 4.0}, {"step": 6, "eval_loss": 2.0},
        {"step": 6, "eval_runtime": 1.0}, {"step": 8, "loss": 7.0}, {"step": 8, "train_loss": 5.0},
    ]  # fmt: skip
    assert train_loss(log, 1, 6) == (3 * 1.0 + 2 * 4.0) / 5
    assert np.isnan(train_loss(log, 6, 7))
    assert evaluated(log, 1, 6) == {"eval_loss": 2.0}


WAYS = {
    "epochs": ({}, {"save_strategy": "epoch", "eval_strategy": "epoch"}, 15),
    "steps": ({"every": 4}, {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 2}, 13),
    "saved-before-the-epoch's-hook": ({}, {"save_strategy": "steps", "save_steps": 6}, 14),
    "saved-before-the-first-row": ({}, {"save_strategy": "steps", "save_steps": 2}, 5),
    "accumulated": ({"every": 2}, {"save_strategy": "epoch", "gradient_accumulation_steps": 2}, 7),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_training_is_one_that_was_never_stopped(tmp_path: Path, way: str) -> None:
    own, changes, stop = WAYS[way]
    straight = callback(run_directory=tmp_path / "a" / "run", **own)
    expected = trainer(tmp_path / "a", straight, **changes)
    expected.train()
    stopped = trainer(tmp_path / "b", callback(run_directory=tmp_path / "b" / "run", **own), Stops(stop), **changes)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    going_on = callback(run_directory=tmp_path / "b" / "run", **own)
    resumed = trainer(tmp_path / "b", going_on, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert any((~seen.trainable).any() for seen in straight.observations.values())
    assert_same(all_of(resumed, going_on, tmp_path / "b"), all_of(expected, straight, tmp_path / "a"))


def test_killed_in_an_epoch_and_resumed(tmp_path: Path) -> None:
    # Not at an epoch's end: the trainer evaluates after it has saved, which draws, and leaves that out when it resumes.
    changes = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "epoch"}
    order = {"folder": str(tmp_path / "b"), "arguments": changes, "stop": 14, "by_kill": True}
    (tmp_path / "b").mkdir()
    assert run_program(order) == -signal.SIGKILL
    assert str(read_run(tmp_path / "b" / "run").status) != "finished"
    made, own = [], []
    for folder, resume in (("a", None), ("b", True)):
        own.append(callback(run_directory=tmp_path / folder / "run"))
        made.append(trainer(tmp_path / folder, own[-1], **changes))
        made[-1].train(resume_from_checkpoint=resume)
    assert_same(all_of(made[1], own[1], tmp_path / "b"), all_of(made[0], own[0], tmp_path / "a"))


def lora(net: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft", reason="no peft")
    net = peft.get_peft_model(
        net, peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    )
    for name, parameter in net.named_parameters():
        if "lora_B" in name:  # zeros, which would leave lora_A without a gradient at first
            nn.init.normal_(parameter, std=0.1)
    return net


def with_compiled_layers(net: nn.Module) -> nn.Module:
    for layer in net.bert.encoder.layer:
        layer.compile(backend="aot_eager")
    return net


@pytest.mark.parametrize(
    ("changes", "prepare"),
    [
        pytest.param({"gradient_accumulation_steps": 2}, None, id="accumulation"),
        pytest.param({"bf16": True}, None, id="bf16"),
        pytest.param({"gradient_checkpointing": True}, None, id="checkpointing"),
        pytest.param({}, lora, id="lora"),
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, None, id="compiled"),
        pytest.param({"torch_compile": True}, None, id="inductor", marks=pytest.mark.slow),
        pytest.param({}, with_compiled_layers, id="compiled-layers"),
        pytest.param({"fp16": True}, None, id="fp16-cpu", marks=FROM_5),
        pytest.param({"fp16": True, "use_cpu": False}, None, id="fp16", marks=pytest.mark.gpu),
    ],
)
def test_frozen_rows_rest_and_the_others_move(tmp_path: Path, changes: dict[str, Any], prepare: Any) -> None:
    own = callback(policy=Sets(0.5))
    watches = Watches(own)
    net = model() if prepare is None else prepare(model())
    trainer(tmp_path, own, watches, net=net, num_train_epochs=2, **changes).train()
    assert own.freezer is not None
    (_, before, frozen), *_ = [step for step in watches.steps if step[0] == 1]
    _, after, _ = watches.steps[-1]
    compared = 0
    for name, trainable in frozen.items():
        module = own.freezer.model.get_submodule(name)
        if not isinstance(module, (nn.Linear, nn.LayerNorm)) or not module.weight.requires_grad:
            continue
        moved = (after[f"{name}.weight"] != before[f"{name}.weight"]).reshape(len(trainable), -1).any(1)
        assert not moved[~trainable].any(), name
        compared += bool(moved.any()) and not trainable.all()
    assert compared > 3, "the test tells nothing"
    assert own.freezer.compiled == ("torch_compile" in changes or prepare is with_compiled_layers)


def test_rows_of_a_dataset(tmp_path: Path) -> None:
    """Those of the datasets library, of which the trainer drops the columns that no model takes."""
    datasets = pytest.importorskip("datasets", reason="no datasets")
    own, expected = callback(), callback()

    def table(given: list[dict[str, Any]]) -> Any:
        return datasets.Dataset.from_list([{**row, "input_ids": row["input_ids"].tolist()} for row in given])

    listed = trainer(tmp_path, expected)  # which sows the random numbers
    listed.train()
    made = trainer(tmp_path, own)
    own.probe, made.train_dataset = table(rows(10, seed=9)), table(rows())
    made.train()
    assert any((~seen.trainable).any() for seen in own.observations.values())
    assert_same(weights(made.model), weights(listed.model))
    for name, seen in expected.observations.items():
        assert torch.equal(own.observations[name].velocity, seen.velocity), name


def test_a_lora_model_resumes(tmp_path: Path) -> None:
    changes = {"save_strategy": "epoch"}
    straight = callback(run_directory=tmp_path / "a" / "run")
    expected = trainer(tmp_path / "a", straight, net=lora(model()), **changes)
    expected.train()
    stopped = trainer(
        tmp_path / "b", callback(run_directory=tmp_path / "b" / "run"), Stops(15), net=lora(model()), **changes
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    going_on = callback(run_directory=tmp_path / "b" / "run")
    resumed = trainer(tmp_path / "b", going_on, net=lora(model()), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "out" / "checkpoint-12"))
    assert_same(all_of(resumed, going_on, tmp_path / "b"), all_of(expected, straight, tmp_path / "a"))


def test_a_callback_goes_on_after_its_training_was_broken_off(tmp_path: Path) -> None:
    """As in a notebook: the same trainer and callback, after Ctrl-C."""
    stops, own = Stops(9), callback(run_directory=tmp_path / "run")
    made = trainer(tmp_path, own, stops, save_strategy="epoch")
    with pytest.raises(KeyboardInterrupt):
        made.train()
    made.remove_callback(stops)
    made.train(resume_from_checkpoint=True)
    assert read_run(tmp_path / "run").metrics["step"].tolist() == [6, 12, 18]


def test_a_program_that_breaks_off_says_so(tmp_path: Path) -> None:
    assert run_program({"folder": str(tmp_path), "arguments": {}, "stop": 8}) == 0
    assert str(read_run(tmp_path / "run").status) == "failed: the training was broken off"


def test_a_translator_in_ready_batches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    net = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
    pairs = [{"input_ids": torch.randint(1, 20, (5,)), "labels": torch.randint(1, 20, (4,))} for _ in range(12)]
    own = NEqCallback(probe=[default_data_collator(pairs[:6])], batch_size=None, policy=Sets(0.5))
    given = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "num_train_epochs": 2}
    Seq2SeqTrainer(net, Seq2SeqTrainingArguments(str(tmp_path), **given), train_dataset=pairs, callbacks=[own]).train()
    assert any(name.startswith("decoder") and (~seen.trainable).any() for name, seen in own.observations.items())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"probe": None}, "probe: none is given"),
        ({"probe": []}, "probe: is empty"),
        ({"probe": iter([1])}, "probe: can be read only once"),
        ({"probe": "rows.json"}, "probe: is a str"),
        ({"batch_size": 0}, "batch_size: 0 is not a positive whole number"),
        ({"every": 0}, 'every: 0 is neither "epoch" nor'),
        ({"every": True}, 'every: True is neither "epoch" nor'),
        ({"every": "step"}, "every: 'step' is neither"),
        ({"exlude": ["a"]}, "no option 'exlude'; did you mean 'exclude'?"),
    ],
)
def test_a_callback_that_cannot_work_is_not_made(options: dict[str, Any], line: str) -> None:
    with pytest.raises(FreezingError) as caught:
        NEqCallback(**{"probe": rows(2), **options})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"probe": [{"words": [1, 2]}]}, "probe: "),
        ({"probe": [{"input_ids": [1, 2]}, {"input_ids": [1]}]}, "probe: its rows cannot be put together"),
        ({"probe": [torch.randn(2, 3)], "batch_size": None}, "probe: a batch is a Tensor; the model is"),
        ({"probe": [{"input_ids": torch.randn(2, 3)}], "batch_size": None}, "probe: a mapping with the keys input_ids"),
        ({"probe": [{"input_ids": torch.full((6,), 99)}]}, "keys input_ids cannot be passed to the model (IndexError"),
        ({"call": lambda model, batch: 1 / 0}, "cannot be passed to the model (ZeroDivisionError: division by zero)"),
        ({"settings": {"net": nn.Identity()}}, "settings.net: is a Identity"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_step(tmp_path: Path, options: dict[str, Any], line: str) -> None:
    made = trainer(tmp_path, callback(run_directory=tmp_path / "run", **options))
    before = weights(made.model)
    with pytest.raises(FreezingError) as caught:
        made.train()
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "probe_loader" not in str(caught.value)
    assert made.state.global_step == 0
    assert_same(weights(made.model), before)


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_anew_where_that_is_asked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callback(run_directory=run), Stops(8)).train()
    before = (run / "metrics.csv").read_bytes()
    with pytest.raises(RunDirectoryError, match=r"there already .*resume_from_checkpoint=.*begin_anew=True") as caught:
        trainer(tmp_path, callback(run_directory=run)).train()
    assert "\n" not in str(caught.value)
    with pytest.raises(FreezingError, match="had another settings; record in another directory"):
        trainer(tmp_path, callback(run_directory=run, begin_anew=True), learning_rate=1e-4).train()
    assert (run / "metrics.csv").read_bytes() == before
    made = []
    for folder in (tmp_path, tmp_path / "straight"):
        own = callback(run_directory=folder / "run", begin_anew=True)
        again = trainer(folder, own)
        again.train()
        made.append(all_of(again, own, folder))
    assert_same(*made)
    with pytest.raises(RunDirectoryError, match=r"there already \(finished\); .*; else give another run_directory$"):
        trainer(tmp_path, callback(run_directory=run, begin_anew=True)).train()


def test_two_on_one_trainer(tmp_path: Path) -> None:
    made = trainer(tmp_path, callback(run_directory=tmp_path / "run"), callback())
    with pytest.raises(FreezingError, match="there are two on this trainer; remove one"):
        made.train()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    made.remove_callback(made.callback_handler.callbacks[-2])
    assert sum(isinstance(one, NEqCallback) for one in made.callback_handler.callbacks) == 1


@pytest.mark.parametrize(("key", "value"), [("fsdp", "full_shard"), ("deepspeed", {"zero_optimization": {"stage": 3}})])
def test_parameters_in_pieces(tmp_path: Path, key: str, value: Any) -> None:
    given = arguments(tmp_path)
    setattr(given, key, value)
    with pytest.raises(FreezingError, match="keeps parameters in pieces"):
        callback().on_init_end(given, None, None)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_parameters_in_pieces_by_accelerate(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(FreezingError, match="keeps parameters in pieces"):
        callback().on_init_end(given, None, None)


def test_what_judges_a_run(tmp_path: Path) -> None:
    loss = arguments(tmp_path, eval_strategy="epoch")
    best = arguments(tmp_path, eval_strategy="epoch", metric_for_best_model="right", greater_is_better=True)
    assert judged_by(arguments(tmp_path), None, None) == ("train_loss", True)
    assert judged_by(loss, None, None) == ("eval_loss", True)
    assert judged_by(best, None, None) == ("eval_right", False)
    assert judged_by(best, "eval_wrong", None) == ("eval_wrong", False)
    assert judged_by(best, "eval_wrong", True) == ("eval_wrong", True)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the folder of a training with a checkpoint of step 4."""
    trainer(tmp_path, callback(), max_steps=4, save_strategy="steps", save_steps=4).train()
    return tmp_path


def resumed(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    made = trainer(folder, *callbacks, max_steps=8, **changes)
    made.train(resume_from_checkpoint=True)
    return made


def test_a_checkpoint_without_its_files(saved: Path) -> None:
    (saved / "out" / "checkpoint-4" / "neq.json").unlink()
    with pytest.raises(FreezingError, match=r"checkpoint-4: has no neq\.json .* begin_anew=True") as caught:
        resumed(saved, callback())
    assert "\n" not in str(caught.value)
    own = callback(begin_anew=True, run_directory=saved / "run")
    assert resumed(saved, own).state.global_step == 8
    assert own.freezer is not None
    assert any("everything trains anew" in note for note in own.freezer.notes)
    assert read_run(saved / "run").metrics["step"].tolist() == [6, 8]


def test_a_damaged_checkpoint(saved: Path) -> None:
    path = saved / "out" / "checkpoint-4" / "neq.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match="its checksum does not fit"):
        resumed(saved, callback())


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 2}', '{"version": 1, "observed": "no"}'])
def test_damaged_values(saved: Path, text: str) -> None:
    (saved / "out" / "checkpoint-4" / "neq.json").write_text(text)
    with pytest.raises(NeqError) as caught:
        resumed(saved, callback())
    assert "neq.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_from_elsewhere_is_named(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Another training's checkpoint of the same step lies in output_dir: its state must not be taken for this one's."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-4}
    trainer(elsewhere, callback(), **changes).train()
    path = elsewhere / "out" / "checkpoint-4"
    with pytest.raises(FreezingError, match="belongs to other weights"):
        trainer(saved, callback(), max_steps=8).train(resume_from_checkpoint=str(path))
    made = trainer(saved, callback(checkpoint=path), max_steps=8)
    made.train(resume_from_checkpoint=str(path))
    assert made.state.global_step == 8
