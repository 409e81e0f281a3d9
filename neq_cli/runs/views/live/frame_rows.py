"""The rows of a frame above its layers: who runs where, how far it is, and the last finished epoch's numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len

from neq_cli.events import OBSERVATION
from neq_cli.runs.views.drawing import (
    DONE,
    FROZEN,
    GRAPH,
    QUIET,
    STRONG,
    Line,
    StatRow,
    bar_line,
    ends,
    histogram,
    rule,
    shorten,
    span,
    text_of,
)
from neq_cli.runs.views.live.layers import format_velocity
from neq_cli.runs.views.live.run_view import VELOCITY_DECADES, RunView, clock
from neq_cli.text import (
    MISSING,
    counted,
    format_flops,
    format_joules,
    format_metric,
    format_percent,
    in_training,
    printable,
)

METRIC_NAMES = {"test_top1": "test top-1", "test_miou": "test mIoU"}
LOWEST, HIGHEST = (f"1e{VELOCITY_DECADES[0]}", f"{10.0 ** VELOCITY_DECADES[1]:.0f}")


def format_loss(value: float) -> str:
    """Four decimals, or three digits where it is large."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def format_rate(value: float) -> str:
    """A learning rate in three significant digits."""
    return f"{value:.3g}" if math.isfinite(value) else MISSING


def format_speed(images_per_second: float, counted: str = "img") -> str:
    """``1234 img/s``, ``3.2 img/s``; ``counted``: of what."""
    if not math.isfinite(images_per_second):
        return f"{MISSING} {counted}/s"
    return f"{images_per_second:.{0 if images_per_second >= 10 else 1}f} {counted}/s"


def format_score(value: float, metric: str) -> str:
    """A test metric with its unit."""
    percent = "%" if metric in METRIC_NAMES and math.isfinite(value) else ""
    return format_metric(value, metric) + percent


def identity_line(view: RunView, width: int) -> Line:
    """Recipe, model and data on the left, device on the right."""
    device = shorten(printable(view.started.device), max(width // 2 - 2, 0))
    recipe = shorten(printable(view.started.recipe_name), max(width - cell_len(device) - 2, 0))
    room = width - cell_len(recipe) - cell_len(device) - 4
    description = shorten(printable(view.started.description), room) if room >= 8 else ""
    return ends([span(recipe, STRONG), span(f"  {description}")], [span(device, QUIET)], width)


def policy_line(view: RunView, width: int) -> Line:
    """The policy on the left, the model's size on the right."""
    size = f"{counted(view.total.neurons, 'neuron')}, {counted(len(view.layers), 'layer')}"
    policy = shorten(f"policy: {printable(view.started.policy)}", width)
    return ends([span(policy)], [span(size, QUIET)], width)


def progress_lines(view: RunView, width: int, now: float) -> list[Line]:
    """A bar for the run and one for the epoch's phase, with speed and time left."""
    epochs, unit, position = view.started.epochs, view.started.unit, view.position
    step, steps = (position.step, position.steps) if position else (0, view.started.steps_per_epoch)
    phase = position.phase if position else "train"
    # Steps of test and probe are not an epoch's: for the run's bar they count as its last tenth.
    within = 0.9 * step / max(steps, 1) if phase == "train" else 0.9
    run_share = min((view.epoch - 1 + within) / max(epochs, 1), 1.0)
    labels = [f"{unit} {view.epochs_done if view.finished else view.epoch}/{epochs}", f"{phase} {step}/{steps}"]
    shares = [run_share, step / max(steps, 1)]
    if view.preparing is not None:
        done, total = view.preparing.done, view.preparing.total
        labels[1], shares[1] = printable(view.preparing.what), done / max(total, 1)
    if view.finished:
        labels[1], shares = "done", [1.0, 1.0]
    label_width = max(len(f"{unit} {epochs}/{epochs}"), len(f"train {steps}/{steps}"), len(labels[1]))
    tails = _progress_tails(view, width, now)
    tail_width = max(*map(len, tails), 34 if width >= 70 else 0)
    return [
        bar_line(label.ljust(label_width), share, tail.rjust(tail_width), width, DONE)
        for label, share, tail in zip(labels, shares, tails, strict=True)
    ]


def _progress_tails(view: RunView, width: int, now: float) -> tuple[str, str]:
    position = view.position
    # At the start of an epoch, and while it is tested and probed, the last one's.
    now_known = position is not None and math.isfinite(position.images_per_second)
    speed = format_speed(
        position.images_per_second if position and now_known else view.last("images_per_second"), view.started.counted
    )
    known = position is not None and math.isfinite(position.train_loss)
    loss = f"loss {format_loss(position.train_loss)}  " if position and known and width >= 70 else ""
    elapsed = clock((now if view.ended is None else view.ended) - view.began)
    if view.finished:
        return f"finished in {elapsed}", speed
    if view.ended is not None:
        return f"stopped after {elapsed}", speed
    if view.compiling is not None:
        speed = f"compiling, {view.compiling.seconds:.0f} s"
    run_left = view.pace.run_left(now, view.started.epochs - view.epoch)
    if width < 50:
        return f"{clock(run_left)} left", speed
    run = f"{elapsed} gone  " if width >= 70 else ""
    # Seven characters for a time: "1:23:45"; a steady width keeps the bars from twitching.
    return (
        f"{run}{clock(run_left):>7} left",
        f"{loss}{speed}  {clock(view.pace.epoch_left(now)):>7} left",
    )


def epoch_rule(view: RunView, width: int) -> Line:
    """Which epoch the numbers below are of, and what it took; of an observation also where it stands, if that fits."""
    unit = view.started.unit
    if not view.epochs_done:
        return rule(f"no {unit} finished yet", "", width)
    took = f"took {clock(view.last('epoch_seconds'))}, probe {view.last('probe_seconds'):.1f} s"
    energy = f", {format_joules(view.last('joules'))}" if "joules" in view.columns else ""
    note = f"lr {format_rate(view.last('lr'))}, {took}{energy}"
    title = f"{unit} {view.epochs_done}"
    place = in_training(None, view.last("passed_epochs")) if unit == OBSERVATION else ""
    whole = rule(title + place, note, width)
    return whole if text_of(whole).endswith(f"{note} ─") else rule(title, note, width)


def loss_row(view: RunView, column: str) -> StatRow:
    """``train_loss`` or ``test_loss``."""
    best, epoch = view.best(column, lowest=True)
    losses = latest_known(view.columns.get(column, ()))
    tails = _best_tails(view, format_loss(best), epoch)
    return StatRow(column.replace("_", " "), format_loss(losses[-1] if losses else math.nan), losses, tails)


def metric_row(view: RunView) -> StatRow:
    """What says how good the model is."""
    metric = view.started.metric
    best, epoch = view.best(metric, lowest=view.started.lower_is_better)
    tails = _best_tails(view, format_score(best, metric), epoch)
    label = METRIC_NAMES.get(metric, printable(metric).replace("_", " "))
    scores = latest_known(view.columns.get(metric, ()))
    return StatRow(label, format_score(scores[-1] if scores else math.nan, metric), scores, tails)


def _best_tails(view: RunView, best: str, epoch: int) -> tuple[str, ...]:
    return (f"best {best} at {view.started.unit} {epoch}", f"best {best}", "") if epoch else ("",)


def latest_known(values: Sequence[float]) -> list[float]:
    """NaN replaced by the value before it: where not every epoch is tested, the latest test stands."""
    known: list[float] = []
    for value in values:
        known.append(value if math.isfinite(value) or not known else known[-1])
    return known


def flops_row(view: RunView, accounting: str) -> StatRow:
    """``paper`` or ``executed`` FLOPs against dense: the epoch's, and the mean over all finished epochs."""
    now = view.columns.get(f"flops_{accounting}", [])
    dense = view.columns.get(f"flops_{accounting}_dense", [])
    shares = [100 * part / whole if whole else math.nan for part, whole in zip(now, dense, strict=False)]
    if not shares:
        return StatRow(f"{accounting} FLOPs", MISSING, (), ("",))
    known = [share for share in shares if math.isfinite(share)]
    mean = format_percent(sum(known) / len(known) if known else math.nan)
    share = format_percent(shares[-1])
    tails = (f"{share} of {format_flops(dense[-1])}, mean {mean}", f"{share}, mean {mean}", share)
    return StatRow(f"{accounting} FLOPs", format_flops(now[-1]), shares, tails, low=0.0, high=100.0)


def frozen_row(view: RunView) -> StatRow:
    """How the share of frozen neurons went, epoch by epoch."""
    counts = zip(view.columns.get("frozen", ()), view.columns.get("neurons", ()), strict=False)
    shares = [100 * frozen / neurons if neurons else math.nan for frozen, neurons in counts]
    if not shares:
        return StatRow("frozen", MISSING, (), ("",))
    counts_then = f"{view.last('frozen'):.0f} of {view.last('neurons'):.0f}"
    tails = (f"{counts_then} in {view.started.unit} {view.epochs_done}", counts_then, "")
    return StatRow("frozen", format_percent(shares[-1]), shares, tails, low=0.0, high=100.0)


def learning_rate_row(view: RunView) -> StatRow:
    """The learning rate each epoch started with."""
    return StatRow("learning rate", format_rate(view.last("lr")), view.columns.get("lr", ()), ("",), low=0.0)


def velocity_row(view: RunView, graph_width: int) -> StatRow:
    """How |velocity| is spread over neurons, on a logarithmic axis, with the policy's threshold marked."""
    total = view.total
    tails: tuple[str, ...] = ("",)
    if view.epsilon is not None and math.isfinite(view.below_epsilon):
        below = f"{format_percent(100 * view.below_epsilon)} below"
        tails = (f"{below} epsilon {view.epsilon:g}", f"{below} {view.epsilon:g}", below)
    drawing = _velocity_axis(view, graph_width)
    return StatRow("|velocity|", format_velocity(total.velocity), (), tails, drawing=drawing)


def _velocity_axis(view: RunView, width: int) -> Line:
    room = width - len(LOWEST) - len(HIGHEST) - 2
    if room < 6:
        return [span(" " * width)]
    low, high = VELOCITY_DECADES
    if view.epsilon is None:
        drawn = [span(histogram(view.velocity_bins.tolist(), room), GRAPH)]
    else:
        columns = histogram(view.velocity_bins.tolist(), room - 1)
        exponent = math.log10(view.epsilon) if view.epsilon > 0 else low
        mark = round(min(max((exponent - low) / (high - low), 0.0), 1.0) * (room - 1))
        drawn = [span(columns[:mark], FROZEN), span("│", STRONG), span(columns[mark:], GRAPH)]
    return [span(f"{LOWEST} ", QUIET), *drawn, span(f" {HIGHEST}", QUIET)]


def frozen_rule(view: RunView, width: int) -> Line:
    """Which epoch the frozen neurons below are those of, also where it is not trained, and what changed with it."""
    unit = view.started.unit
    title = f"frozen in {unit} {view.epoch}"
    if view.finished:
        title = f"would freeze next, in {unit} {view.epochs_done + 1}"
    changes = f"{view.froze} froze, {view.thawed} thawed" if view.epochs_done else ""
    return rule(title, changes, width)


def total_line(view: RunView, width: int) -> Line:
    """Frozen neurons of all layers together."""
    total = view.total
    share = total.frozen / total.neurons if total.neurons else 0.0
    layers = counted(len(view.layers), "layer")
    label = (f"all {layers}" if len(view.layers) != 1 else layers).ljust(14) if width >= 36 else "all"
    if not view.frozen_known:
        return bar_line(label, 0.0, f"{MISSING}/{total.neurons} ", width, FROZEN)
    tail = f"{total.frozen}/{total.neurons} {format_percent(100 * share):>6}"
    return bar_line(label, share, tail, width, FROZEN)
