"""From a recipe to a run that is ready to start: everything built, seeded, on its device and checked to fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from neq_cli.errors import FreezingError, RecipeValueError
from neq_cli.events import RunStarted
from neq_cli.freed_memory import keep_freed_memory
from neq_cli.freezing import Freezer, Policy
from neq_cli.freezing.anatomy import Anatomy
from neq_cli.freezing.backward.dispatch import Dispatch, KernelChoice
from neq_cli.freezing.backward.sliced import BackwardMode
from neq_cli.recipe import NEqPolicy, Recipe
from neq_cli.training.batches.loaders import Loaders, make_loaders
from neq_cli.training.batches.sampling import Share
from neq_cli.training.data.catalogue import Shape
from neq_cli.training.data.parts import Data, load_data
from neq_cli.training.errors import of_the_recipe
from neq_cli.training.loop.course import Course
from neq_cli.training.loop.optimizers import build_optimizer
from neq_cli.training.loop.schedules import Schedule, scheduler_notes
from neq_cli.training.loop.step import AUTOCAST, averaged_of
from neq_cli.training.loop.tasks import build_task, lower_is_better
from neq_cli.training.loop.trainer import Trainer
from neq_cli.training.machine.device import describe_device, resolve_device, seed_everything
from neq_cli.training.machine.energy.measured import energy_of
from neq_cli.training.machine.full_memory import full_memory_named
from neq_cli.training.machine.memory_format import Agree, choose_layout
from neq_cli.training.models.build import build_model
from neq_cli.training.models.weights import load_weights
from neq_cli.training.policies import build_policy, describe_policy, match
from neq_cli.training.processes.blocks import blocks_of
from neq_cli.training.processes.joined import Processes
from neq_cli.training.processes.sync_batchnorm import synchronised
from neq_cli.training.sample import Sample, check_together
from neq_cli.training.startup import Startup

if TYPE_CHECKING:
    from neq_cli.training.processes.divided import Divided


@dataclass(frozen=True)
class Session:
    """A run before its first step. ``recipe`` has ``matched_p`` where the policy matches another run."""

    recipe: Recipe
    trainer: Trainer
    started: RunStarted
    data_content: Mapping[str, Any]  # what the data holds, wherever it lies: for the run directory
    matched_flops: float | None = None  # what the p was matched to, where that was found here
    found: tuple[str, ...] = ()  # keys that the recipe leaves open, and that were found in the data


@full_memory_named("before epoch 1")
def prepare(
    recipe: Recipe,
    name: str,
    matched_flops: float | None = None,
    processes: Processes | None = None,
    *,
    resumed: bool = False,
    choices: Mapping[str, Any] | None = None,
    earlier: Mapping[str, KernelChoice] | None = None,
    agree: Agree | None = None,
    startup: Startup | None = None,
    notes: Sequence[str] = (),
) -> Session:
    """Build model, data, optimiser, schedule and Freezer of ``recipe``, called ``name``.

    ``matched_flops`` is the mean paper FLOPs that ``p: match:RUN_DIR`` asks for. ``processes`` train it together.
    ``resumed``: a checkpoint will be loaded, so that no weights to start from are needed; ``choices``: the kernels
    chosen so far, and ``earlier`` what other runs have timed; ``agree`` finds the memory format that other runs train
    in too; ``startup`` is told what takes time; ``notes`` are the recipe's. Raises RecipeError, one line, for whatever
    only the real data or model can show to be wrong.
    """
    processes = Processes() if processes is None else processes
    startup = Startup() if startup is None else startup
    device = _start_device(recipe, processes, startup)
    with startup.part("looking for energy meters", told=recipe.energy):
        energy = energy_of(recipe, device, processes)
    with startup.part("opening the data"):
        data = _load_data(recipe, processes)
    recipe, found = _with_found(recipe, data)
    loaders = make_loaders(
        data,
        recipe.batch_size,
        recipe.data.workers,
        recipe.seed,
        device,
        cache=recipe.data.cache,
        share=Share(processes.rank, processes.count, processes.local_count),
        startup=startup,
    )
    model, weights_notes = _build_network(recipe, data, startup, resumed=resumed)
    task = build_task(recipe.task, recipe.label_smoothing, data.num_classes)
    sample = check_together(recipe, model, data, task)  # on the CPU, where an error in a kernel says what is wrong
    model.to(device)
    image_shape = data.image_shape if sample.call is None else None
    recipe, model, layout_notes = _lay_out(recipe, model, image_shape, device, processes, startup, agree)
    course = Course.of(recipe, len(loaders.train))
    recipe, match_notes = match(recipe, model, sample, matched_flops, course.observations)
    divided = _divide(recipe, model, device, processes)
    # Of the parameters as they are laid out now: moved or replaced ones would not be those that it updates.
    optimizer = build_optimizer(recipe.optimizer, model, capturable=recipe.cuda_graph)
    # The others would wait for a kind of call that the first process may never meet: its batches have other shapes.
    by_rule = data.as_it_is and processes.count > 1
    dispatch = Dispatch(fixed=recipe.deterministic or by_rule, agree=processes.kernel, known=earlier)
    policy = build_policy(recipe.policy, recipe.seed, course.observations)
    freezer = _make_freezer(
        recipe, model, optimizer, policy, loaders, sample, dispatch, choices or {}, processes, startup
    )
    trainer = Trainer(
        recipe=recipe,
        device=device,
        channels_last=bool(recipe.channels_last),
        model=model,
        loaders=loaders,
        task=task,
        optimizer=optimizer,
        course=course,
        schedule=Schedule(
            recipe.scheduler, optimizer, recipe.epochs, course.updates, lower_is_better=lower_is_better(task)
        ),
        freezer=freezer,
        processes=processes,
        startup=startup,
        energy=energy,
        divided=divided,
    )
    _seed_apart(recipe, processes)
    told = [loaders.note, *notes, *weights_notes, *sample.notes, *data.notes, *energy.notes]
    told += scheduler_notes(recipe.scheduler, recipe.epochs, course.updates)
    if by_rule and not recipe.deterministic:
        told.append("kernels: by rule, not timed, as the processes' batches may differ in shape")
    started = RunStarted(
        recipe_name=name,
        description=f"{recipe.model.name or recipe.model.entrypoint} on {data.name}",
        policy=describe_policy(recipe.policy),
        device=describe_device(device, processes.count),
        epochs=course.observations,
        steps_per_epoch=course.probe_every or len(loaders.train),
        metric=trainer.task.metric,
        layers={name: layer.neurons for name, layer in freezer.layers.items()},
        notes=(
            *told,
            *layout_notes,
            *([divided.note] if divided is not None else []),
            *match_notes,
            *freezer.notes,
            f"coverage: {freezer.coverage()}",
            *freezing_notes(freezer.anatomy, recipe.backward),
        ),
        epsilon=recipe.policy.epsilon if isinstance(recipe.policy, NEqPolicy) else None,
        lower_is_better=lower_is_better(task),
        counted="items" if data.as_it_is else "img",
        unit=recipe.unit,
    )
    return Session(recipe, trainer, started, data.content(), matched_flops, found)


def _start_device(recipe: Recipe, processes: Processes, startup: Startup) -> torch.device:
    """Return the device, ready to compute, with everything random seeded: before anything is drawn."""
    device = resolve_device(recipe.device, processes.local_rank if processes.count > 1 else None)
    _check_device(recipe, device, processes)
    if device.type == "cpu":
        keep_freed_memory()
    seed_everything(recipe.seed, deterministic=recipe.deterministic)
    if device.type == "cuda":
        with startup.part("starting CUDA"):
            torch.zeros((), device=device).item()
    return device


def _build_network(recipe: Recipe, data: Data, startup: Startup, *, resumed: bool) -> tuple[nn.Module, Sequence[str]]:
    """Return the network, still on the CPU, with the weights to start from, and what is to be said of those."""
    with startup.part("building the model"):
        model = build_model(recipe.model, data.num_classes, recipe.task)
    if resumed:
        return model, ()
    with startup.part("loading weights", told=recipe.model.weights is not None):  # may be downloaded
        return model, load_weights(model, recipe.model, recipe.task)


def _lay_out(
    recipe: Recipe,
    model: nn.Module,
    image_shape: Shape | None,
    device: torch.device,
    processes: Processes,
    startup: Startup,
    agree: Agree | None,
) -> tuple[Recipe, nn.Module, list[str]]:
    """Return the network in the memory format that it trains in, and the recipe, where it asks, with the faster one."""
    notes = []
    if recipe.channels_last == "auto" and _is_divided(recipe, processes):
        recipe = recipe.model_copy(update={"channels_last": False})
        notes.append("channels_last: false, as fsdp divides contiguous weights")
    elif recipe.channels_last == "auto":
        with startup.part("timing memory formats"):
            chosen = choose_layout(
                model,
                image_shape,
                recipe.batch_size,
                autocast=AUTOCAST[recipe.precision],
                fixed=recipe.deterministic,
                agree=agree,
            )
        channels_last, note = processes.shared(chosen)
        recipe = recipe.model_copy(update={"channels_last": channels_last})
        notes.append(note)
    model.to(memory_format=torch.channels_last if recipe.channels_last else torch.contiguous_format)
    if recipe.sync_batchnorm and processes.count > 1:
        model = synchronised(model, device)  # from here on, a forward pass in training is all processes'
    return recipe, model, notes


def _divide(recipe: Recipe, model: nn.Module, device: torch.device, processes: Processes) -> Divided | None:
    """Divide the network over the processes, where the recipe says so and there are several."""
    if not _is_divided(recipe, processes):
        if recipe.parallel == "fsdp":
            blocks_of(model, recipe.fsdp.blocks)  # globs that match nothing are told on any number
        return None
    from neq_cli.training.processes.divided import check_divided, divide

    # Now that all of it is there: what averages its weights begins as a copy.
    divided = divide(recipe, model, averaged_of(recipe, model), device, processes)
    check_divided(recipe.optimizer, divided.mesh)
    return divided


def _make_freezer(
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    policy: Policy,
    loaders: Loaders,
    sample: Sample,
    dispatch: Dispatch,
    choices: Mapping[str, Any],
    processes: Processes,
    startup: Startup,
) -> Freezer:
    """Return the Freezer, which looks at the network as it stands: with everything that acts on it in place."""
    try:
        dispatch.load_state_dict(choices)
        with startup.part("looking at the model"):
            return Freezer(
                model,
                optimizer,
                loaders.probe,
                policy,
                backward=recipe.backward,
                dispatch=dispatch,
                compiled=recipe.compile,
                exclude=recipe.exclude,
                process_group=processes.group,
                probe_snapshot=recipe.probe_snapshot,
                call=sample.call,
                sample=sample.batch if sample.given else None,
            )
    except FreezingError as error:
        raise of_the_recipe(error) from error


def _seed_apart(recipe: Recipe, processes: Processes) -> None:
    """Give each process but the first its own seed from now on: what is random within the model, such as dropout."""
    if not processes.first:
        words = np.random.SeedSequence([recipe.seed, processes.rank]).generate_state(1)
        seed_everything(int(words[0]), deterministic=recipe.deterministic)


def _check_device(recipe: Recipe, device: torch.device, processes: Processes) -> None:
    if recipe.cuda_graph and device.type != "cuda":
        raise RecipeValueError(
            "cuda_graph", f"needs a CUDA device, and the run is on {device}; use device=cuda, or set it to false"
        )
    if processes.count == 1:
        return
    if _is_divided(recipe, processes):
        from neq_cli.training.processes.divided import check_dividable

        check_dividable(recipe)
    if recipe.cuda_graph:
        raise RecipeValueError("cuda_graph", f"is for one process, and there are {processes.count}; set it to false")
    if device.type not in ("cpu", "cuda"):
        raise RecipeValueError("device", f"{device} is for one process, and there are {processes.count}; use cpu")


def _is_divided(recipe: Recipe, processes: Processes) -> bool:
    return recipe.parallel == "fsdp" and processes.count > 1


def _load_data(recipe: Recipe, processes: Processes) -> Data:
    """Load on one process of every machine first, which downloads what is missing."""
    if processes.local_rank == 0:
        data = load_data(recipe.data, recipe.seed, own_task=recipe.task_is_own)
    processes.wait()
    return data if processes.local_rank == 0 else load_data(recipe.data, recipe.seed, own_task=recipe.task_is_own)


def _with_found(recipe: Recipe, data: Data) -> tuple[Recipe, tuple[str, ...]]:
    """Return the recipe with how images are prepared, as it is used, and the keys of what it left open."""
    used = data.used(recipe.data)
    found = tuple(f"data.{key}" for key in type(used).model_fields if getattr(used, key) != getattr(recipe.data, key))
    return recipe.model_copy(update={"data": used}), found


def freezing_notes(anatomy: Anatomy, mode: BackwardMode) -> list[str]:
    """Return a line for every reason why something always trains, or cannot be computed in part.

    Normalisation layers never can; they are listed with the kernels, in dispatch.json.
    """
    by_reason: dict[str, list[str]] = {}
    if mode != "dense":
        for name, reason in anatomy.dense_because.items():
            if anatomy.neurons.layers[name].cost not in ("norm", "lookup") and name not in anatomy.never_frozen:
                by_reason.setdefault(f"dense gradient used ({reason})", []).append(name)
    for name, reason in anatomy.never_frozen.items():
        by_reason.setdefault(f"never frozen ({reason})", []).append(name)
    for name, reason in anatomy.neurons.outside.items():
        by_reason.setdefault(f"outside neurons, always trained ({reason})", []).append(name)
    notes = [f"{reason}: {', '.join(names)}" for reason, names in by_reason.items()]
    if mode == "truncated":
        notes.insert(0, "backward: truncated is an approximation; frozen neurons pass no error to the layers below")
    return notes
