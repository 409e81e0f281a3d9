"""Runs whose model several processes hold in parts (gloo, CPU): what they train, keep, and lose when one is killed."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alike_runs import assert_alike, untimed_rows
from rounding import apart_after_steps, phi_apart, unit
from safetensors.numpy import load_file
from timings import SECONDS
from torch import Tensor

from neq_cli.training.loop.checkpoint import load_state

PARTS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def digits():
    from neq_cli.training.data.digits import load_digits
    (images, labels), (tested, answers) = load_digits()
    # Of 61 tested images two processes have 31 and 30: one has two batches of 30, and the other one.
    return TensorDataset(images[:420], labels[:420]), TensorDataset(tested[:61], answers[:61])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 25), nn.Linear(25, 12)

    def forward(self, hidden):
        return hidden + self.down(torch.tanh(self.up(self.norm(hidden))))


class Blocks(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.first, self.blocks, self.head = nn.Linear(64, 12), nn.ModuleList([Block(), Block()]), nn.Linear(12, 10)
        self.dtype = dtype
        self.to(dtype)

    def forward(self, images):
        hidden = self.first(images.flatten(1).to(self.dtype))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Convolutions(nn.Sequential):
    def forward(self, images):
        return super().forward(images.double())


def blocks():
    return Blocks(torch.float64)


def single():
    return Blocks(torch.float32)


def convolutions():
    return Convolutions(
        nn.Conv2d(1, 7, 3), nn.BatchNorm2d(7), nn.Tanh(), nn.Conv2d(7, 5, 3), nn.BatchNorm2d(5), nn.Flatten(),
        nn.Dropout(0.0), nn.Linear(80, 10),
    ).double()


def dropped():
    return nn.Sequential(Blocks(torch.float64), nn.Dropout(0.2))
"""

RECIPE = """
model: {entrypoint: "parts:blocks"}
data: {entrypoint: "parts:digits", mean: [0.3], std: [0.35], augment: crop, workers: 0, cache: memory, probe_size: 60}
epochs: 3
batch_size: 30
optimizer: {name: adamw, lr: 0.01, weight_decay: 0.1}
scheduler: {name: multistep, milestones: [2]}
policy: {kind: neq, epsilon: 0.1}
gradient_accumulation: 2
clip_grad_norm: 0.5
ema: 0.9
seed: 3
deterministic: true
device: cpu
"""

# In double precision: forward no value is rounded more than 300 times, backward as often, and 60 images are added up;
# six steps in each of three epochs, in pairs.
STEPS, ROUNDINGS = 9, 2000
WEIGHTS = apart_after_steps(STEPS, ROUNDINGS)
OBSERVED = 8 * (phi_apart(10 * STEPS * ROUNDINGS, 60) + unit(torch.float32))
SHARDED = ("parallel=fsdp",)

Trainings = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("divided"))


def filled(folder: Path) -> Path:
    (folder / "parts.py").write_text(PARTS)
    (folder / "small.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def together(neq_in: Callable[..., Any]) -> Trainings:
    """Start `neq train` in several processes that train together: ``together(folder, count, arguments..., before={})``.

    ``before`` is code to run first, by the number of the process. Returns them when all have ended.
    """

    def start(folder: Path, count: int, *arguments: str, before: Mapping[int, str] | None = None) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = []
        for rank in range(count):
            several = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            several |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
            here = folder / f"elsewhere{rank}" if rank else folder  # whoever starts them need not do so in one folder
            here.mkdir(exist_ok=True)
            call = ["train", str(folder / "small.yaml"), *arguments]
            code = (before or {}).get(rank, "")
            processes.append(neq_in(here, *call, environment=several if count > 1 else {}, before=code))
        for one in processes:
            one.wait(120)
        return processes

    return start


def well(processes: list[Any]) -> None:
    for one in processes:
        assert one.code == 0, one.text


@pytest.fixture(scope="module")
def trained(place: Path, together: Trainings) -> Callable[..., Path]:
    """Return the run directory of a training that went well, trained once: ``trained("name", count, arguments...)``."""

    def run(name: str, count: int, *arguments: str) -> Path:
        if not (place / name).exists():
            well(together(place, count, "-o", name, *arguments))
        return place / name

    return run


@pytest.fixture(scope="module")
def straight(trained: Callable[..., Path]) -> Path:
    """The run of two processes that nothing happened to."""
    return trained("straight", 2, *SHARDED)


def last(run: Path, name: str = "last") -> Any:
    state = load_state(run / "checkpoints" / f"{name}.safetensors")
    if state["so_far"] is not None:
        state["so_far"] = {key: value for key, value in state["so_far"].items() if key not in SECONDS}
    return state


def tensors(state: Any, place: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested state by their places; the random states of single processes aside."""
    if isinstance(state, Tensor):
        return {place: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {
        key: one
        for name, value in items
        if name != "processes"
        for key, one in tensors(value, f"{place}/{name}").items()
    }


def assert_same(one: Path, other: Path) -> None:
    """Assert that two runs hold the same, to the bit; folders of shards are numbered as they come."""
    assert untimed_rows(one) == untimed_rows(other)
    for name in (
        "weights.safetensors",
        "layers.csv",
        *(f"neurons/epoch_{epoch:04d}.safetensors" for epoch in (1, 2, 3)),
    ):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("last", "best"):
        first, second = tensors(last(one, name)), tensors(last(other, name))
        assert list(first) == list(second)
        for key, values in first.items():
            assert torch.equal(values, second[key]), key


@pytest.mark.parametrize("count", [2, 3])
def test_divided_training_is_that_of_one_process(trained: Callable[..., Path], straight: Path, count: int) -> None:
    one = trained("one", 1, "batch_size=60", *SHARDED)  # which divides nothing
    several = straight if count == 2 else trained("three", 3, "batch_size=20", *SHARDED)
    assert_alike(one, several, WEIGHTS, OBSERVED)
    assert not list((one / "checkpoints").glob("shards_*"))
    notes = json.loads((several / "environment.json").read_text())["notes"]
    assert f"parallel: fsdp over {count} processes, in 2 blocks (Block) and the rest" in notes


def test_divided_training_is_that_of_copies(trained: Callable[..., Path], straight: Path) -> None:
    assert_alike(trained("copies", 2), straight, WEIGHTS, OBSERVED)
    every = trained("every", 2, *SHARDED, "fsdp.blocks=['blocks.*','blocks.1.up','head']")  # one within another
    assert_alike(every, straight, WEIGHTS, OBSERVED)


def test_batch_norm(trained: Callable[..., Path]) -> None:
    convolutions = ["model.entrypoint=parts:convolutions", "epochs=2", "optimizer={name: sgd, lr: 0.1, momentum: 0.9}"]
    assert_alike(
        trained("norm-copies", 2, *convolutions), trained("norm", 2, *convolutions, *SHARDED), WEIGHTS, OBSERVED
    )
    one = trained("norm-one", 1, *convolutions, "batch_size=60")
    assert_alike(
        one,
        trained("norm-three", 3, *convolutions, "batch_size=20", "sync_batchnorm=true", *SHARDED),
        WEIGHTS,
        OBSERVED,
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision(trained: Callable[..., Path], precision: str) -> None:
    half = ["model.entrypoint=parts:single", f"precision={precision}", "epochs=2"]
    copies = trained(f"{precision}-copies", 2, *half)
    # Both round the same numbers to half, so that single precision's rounding is left; a step moves a weight by 1e-2.
    assert_alike(copies, trained(precision, 2, *half, *SHARDED), weights=1e-5, observed=1e-4)


def test_what_each_process_keeps_and_sends(straight: Path) -> None:
    files = sorted((straight / "checkpoints").glob("shards_*/*"))
    assert {path.name for path in files} == {"1-of-2.safetensors", "2-of-2.safetensors"}
    parts = [load_file(path) for path in files[-2:]]
    state = last(straight)
    weight = state["model"]["blocks.0.up.weight"]
    assert [len(part["model/blocks.0.up.weight"]) for part in parts] == [13, 12]
    assert np.array_equal(np.concatenate([part["model/blocks.0.up.weight"] for part in parts]), weight.numpy())
    number = list(state["model"]).index("blocks.0.up.weight")
    moment = np.concatenate([part[f"optimizer/state/{number}/exp_avg"] for part in parts])
    assert np.array_equal(moment, state["optimizer"]["state"][number]["exp_avg"].numpy())
    assert moment.any()
    names = set(parts[0])
    assert {f"freezer/previous/{name}" for name in state["model"]} <= names
    assert {f"averaged/module.{name}" for name in state["model"]} <= names
    # Nothing that is divided lies in the checkpoint's own file as well.
    assert not names & {name.strip("/") for name in load_file(straight / "checkpoints" / "last.safetensors")}
    padded = sum((len(one) + len(one) % 2) * one[:1].numel() for one in state["model"].values())
    assert float(untimed_rows(straight)[0]["bytes_per_step"]) == 8 * padded


def test_shards_of_no_checkpoint_are_removed(straight: Path) -> None:
    from neq_cli.training.loop.checkpoint import shards_of

    folder = straight / "checkpoints"
    kept = {shards_of(folder / f"{name}.safetensors") for name in ("last", "previous", "best")}
    assert set(folder.glob("shards_*")) == kept


def test_a_resumed_run_is_the_run_never_interrupted_bit_for_bit(
    place: Path, trained: Callable[..., Path], together: Trainings
) -> None:
    dropped = ["model.entrypoint=parts:dropped", *SHARDED]
    whole = trained("dropped", 2, *dropped)
    well(together(place, 2, "-o", "resumed", *dropped, "epochs=2"))
    well(together(place, 2, "-o", "resumed", *dropped, "--resume"))
    assert_same(whole, place / "resumed")


SAVES_AND_ENDS = """
import neq_cli.jobs.follower as follower
follower.Follower.follow = lambda self: self._save()
"""


@pytest.mark.parametrize(("count", "divided"), [(3, True), (4, True), (2, False), (1, False)])
def test_another_number_of_processes_takes_over_all_there_is(
    straight: Path, tmp_path: Path, together: Trainings, count: int, divided: bool
) -> None:
    folder = filled(tmp_path)
    shutil.copytree(straight, folder / "run")
    arguments = ["-o", "run", "--resume", "epochs=4", f"batch_size={60 // count}", *(SHARDED if divided else ())]
    well(together(folder, count, *arguments, before=dict.fromkeys(range(count), SAVES_AND_ENDS)))
    before, after = last(straight), last(folder / "run")
    if count > 2:  # else those of the checkpoints before remain
        assert len(list((folder / "run" / "checkpoints").glob(f"shards_*/*-of-{count}.*"))) == count
    assert [before["epoch"], before["scheduler"]] == [after["epoch"], after["scheduler"]]
    found = tensors(after)
    for key, values in tensors(before).items():
        assert torch.equal(values, found[key]), key
    assert any("exp_avg_sq" in key for key in found)
    assert any("velocity" in key for key in found)


@pytest.mark.parametrize(
    ("begun", "goes_on"),
    [((3, "batch_size=20", *SHARDED), (2, *SHARDED)), ((2,), (2, *SHARDED)), ((2, *SHARDED), (1, "batch_size=60"))],
)
def test_runs_go_on_otherwise_divided(
    straight: Path, tmp_path: Path, together: Trainings, begun: Any, goes_on: Any
) -> None:
    folder = filled(tmp_path)
    well(together(folder, begun[0], "-o", "run", "epochs=2", *begun[1:]))
    well(together(folder, goes_on[0], "-o", "run", "--resume", *goes_on[1:]))
    assert_alike(straight, folder / "run", WEIGHTS, OBSERVED)


def test_they_are_read_in_one_process(straight: Path, tmp_path: Path, neq_in: Callable[..., Any]) -> None:
    final = load_file(straight / "weights.safetensors")
    for source in ("last", "final"):
        export = neq_in(tmp_path, "export", straight, "--from", source, "-o", f"{source}.safetensors")
        assert export.wait() == 0, export.text
        found = load_file(tmp_path / f"{source}.safetensors")
        assert list(found) == list(final)
        assert all((found[name] == values).all() for name, values in final.items())
    inspected = neq_in(tmp_path, "inspect", straight, "--json")
    assert inspected.wait() == 0, inspected.text
    tested = neq_in(
        tmp_path, "evaluate", straight, "--weights", "last", "--json", environment={"PYTHONPATH": str(straight)}
    )
    assert tested.wait() == 0, tested.text
    found_loss = json.loads(tested.result)["metrics"]["loss"]
    assert found_loss == pytest.approx(float(untimed_rows(straight)[-1]["test_loss"]), rel=1e-6)


def damage(run: Path, what: str) -> None:
    *_, folder = sorted((run / "checkpoints").glob("shards_*"))
    shard = folder / "2-of-2.safetensors"
    if what == "missing":
        shard.unlink()
    elif what == "cut":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif what == "bit":
        content = bytearray(shard.read_bytes())
        content[-9] ^= 1
        shard.write_bytes(content)
    else:  # that of the checkpoint before
        before = sorted((run / "checkpoints").glob("shards_*"))[-2] / shard.name
        shard.write_bytes(before.read_bytes())


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", "2-of-2.safetensors: missing"), ("cut", "bytes of tensors where"),
        ("bit", "its checksum does not fit"), ("another's", "of another checkpoint"),
    ],
)  # fmt: skip
def test_damaged_shards_give_way_to_the_checkpoint_before(
    straight: Path, tmp_path: Path, together: Trainings, neq_in: Callable[..., Any], what: str, said: str
) -> None:
    folder = filled(tmp_path)
    shutil.copytree(straight, folder / "run")
    damage(folder / "run", what)
    export = neq_in(folder, "export", "run", "--from", "last", "-o", "weights.safetensors")
    assert export.wait() == 2
    (line,) = export.lines
    assert said in line
    if what == "bit":
        well(went_on := together(folder, 2, "-o", "run", "--resume", *SHARDED))
        assert any(said in line and line.endswith("going on from previous.safetensors") for line in went_on[0].lines)
        assert_same(straight, folder / "run")


# Just before a process's k-th change of a file of the run, it is killed.
DIES = """
import os, signal, sys
left = {number}


def changes(event, arguments):
    global left
    opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (opened or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")) and {what!r} in str(arguments[0]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(changes)
"""


@pytest.mark.parametrize(
    ("rank", "what", "number"),
    [
        (1, "shards_", 3),  # about to write its part of the third checkpoint
        (0, ".last.safetensors.partial", 9),  # its file, or that which takes its place
        pytest.param(0, "shards_", 7, marks=pytest.mark.slow),
        pytest.param(0, "last.safetensors", 8, marks=pytest.mark.slow),
        pytest.param(0, "best.safetensors", 4, marks=pytest.mark.slow),
        pytest.param(1, "shards_", 8, marks=pytest.mark.slow),
    ],
)
def test_killed_while_a_checkpoint_is_written(
    straight: Path, tmp_path: Path, together: Trainings, rank: int, what: str, number: int
) -> None:
    folder = filled(tmp_path)
    often = [*SHARDED, "checkpoint_minutes=0.0001"]  # after every update
    ended = together(folder, 2, "-o", "run", *often, before={rank: DIES.format(what=what, number=number)})
    assert ended[rank].code == -signal.SIGKILL
    other = ended[1 - rank]
    assert other.code == 1
    assert f"lost process {rank}, which was killed" in other.text
    assert "Traceback" not in other.text
    well(together(folder, 2, "-o", "run", "--resume", *often))
    assert_same(straight, folder / "run")


AFTER = """
import os, signal, threading
threading.Timer({seconds}, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(straight: Path, tmp_path: Path, together: Trainings, seed: int) -> None:
    import random

    folder, draw, kills = filled(tmp_path), random.Random(seed), 0
    often = [*SHARDED, "checkpoint_minutes=0.0001", "-o", "run", "--resume"]
    for _ in range(6):
        rank = draw.randrange(2)
        ended = together(folder, 2, *often, before={rank: AFTER.format(seconds=draw.uniform(1.0, 4.0))})
        kills += ended[rank].code == -signal.SIGKILL
        assert "Traceback" not in ended[1 - rank].text
    well(together(folder, 2, *often))
    assert kills > 1
    assert_same(straight, folder / "run")


FULL = """
import neq_cli.training.loop.shard_storage as storage
stock = storage.write_tensors
def full(tensors, metadata, path):
    if path.parent.name.endswith("2"):
        raise OSError(28, "No space left on device")
    return stock(tensors, metadata, path)
storage.write_tensors = full
"""


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(tmp_path: Path, together: Trainings) -> None:
    folder = filled(tmp_path)
    ended = together(folder, 2, "-o", "run", *SHARDED, before={1: FULL})
    assert [one.code for one in ended] == [1, 1]
    said = [line for one in ended for line in one.lines if "No space left" in line]
    (line,) = said
    assert "process 1 cannot read or write its part" in line
    assert "Traceback" not in ended[0].text + ended[1].text
    assert last(folder / "run")["epoch"] == 1
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "failed"


UNSEEN = """
import neq_cli.jobs.checkpoints as checkpoints
checkpoints.Path = type("Path", (type(checkpoints.Path()),), {"is_dir": lambda self: False})
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compile=true"], "compile=true: is not for a model that parallel: fsdp divides; set it to false"),
        (["channels_last=true"], "channels_last=true: is not for a model that parallel: fsdp divides, whose weights"),
        (["policy.scope=front", "policy.share=0.8", "policy.front_mode=inference"], "policy.front_mode=inference: "),
        (["fsdp.blocks=['bloks.*']"], "fsdp.blocks=['bloks.*']: no module with weights and a forward pass matches"),
        (["optimizer={name: rprop}"], "optimizer.name: rprop takes no step with weights that parallel: fsdp divides ("),
        (["parallel=tensor"], "parallel=tensor: 'tensor' is not one of ddp, fsdp"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(
    tmp_path: Path, together: Trainings, arguments: list[str], said: str
) -> None:
    folder = filled(tmp_path)
    ended = together(folder, 2, "-o", "run", *SHARDED, *arguments)
    assert [one.code for one in ended] == [2, 2]
    (line,) = [line for one in ended for line in one.lines if "warning" not in line]
    assert said in line
    assert not (folder / "run" / "recipe.yaml").exists()


def test_a_directory_that_a_process_does_not_see_is_refused(tmp_path: Path, together: Trainings) -> None:
    folder = filled(tmp_path)
    ended = together(folder, 2, "-o", "run", *SHARDED, before={1: UNSEEN})
    assert 2 in [one.code for one in ended]
    assert "checkpoints: not there for process 1, and with parallel: fsdp every process writes" in ended[1].text
    assert "Traceback" not in ended[0].text + ended[1].text
