"""How `neq flops` and `neq bench` show what they counted and measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from neq_cli.events import Compiling
from neq_cli.runs.views.live.progress import PlainProgress, can_show_frames, compiling_text
from neq_cli.text import MISSING, format_flops, format_percent, printable, ratio_percent

Result = Mapping[str, Any]
"""What `neq bench --json` prints."""

_LEGEND = "step: median\ntime: over the dense step measured beside it, before and after; median of the\nrounds' ratios"
_LEGEND_OF_COUNTS = (
    "FLOPs: forward and back-propagation as executed, over the dense step's\n"
    "saved: kept for the backward pass beside weights and buffers, in MB"
)
_CUSTOMARY = 0.95
_APPROXIMATE = "truncated is an approximation: frozen neurons pass no error to the layers below"
_PARTS = ("forward", "backward", "optimizer", "row_keeping")


class BenchProgress(Protocol):
    """What is told how a bench gets on."""

    def show(self, done: int, visits: int, what: str) -> None:
        """Take in how many visits are done, of how many, and what comes next."""

    def compiling(self, record: Compiling) -> None:
        """Take in for how long something has been compiled, from another thread."""


@contextmanager
def bench_progress(console: Console | None = None) -> Iterator[BenchProgress]:
    """Yield what is to be told how a bench gets on: a line on a terminal, elsewhere only lines of what compiles.

    It is drawn only when told, for a thread that draws would take part in what is measured.
    """
    console = Console(stderr=True) if console is None else console
    if not can_show_frames(console):
        yield _Lines(console)
        return
    columns = (BarColumn(20), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        yield _Bar(progress)


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("")
        self._what = ""

    def show(self, done: int, visits: int, what: str) -> None:
        self._what = what
        self._progress.update(self._task, completed=done, total=visits, description=what, refresh=True)

    def compiling(self, record: Compiling) -> None:
        what = self._what if record.ended else f"{self._what} ({compiling_text(record)})"
        self._progress.update(self._task, description=what, refresh=True)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._plain = PlainProgress(console)

    def show(self, done: int, visits: int, what: str) -> None:
        pass

    def compiling(self, record: Compiling) -> None:
        self._plain.show(record)


def render_bench(result: Result, layers: float) -> RenderableType:
    """Return the tables; the first mode and order with the share ``layers`` frozen is shown layer by layer."""
    detailed = next(one for one in result["measurements"] if one["frozen_fraction"] == layers)
    truncated = any(one["backward"] == "truncated" for one in result["measurements"])
    legend = "\n".join([_LEGEND, *_interval_legend(result), _LEGEND_OF_COUNTS, *([_APPROXIMATE] if truncated else [])])
    return Group(_circumstances(result), "", *_steps(result), Text(legend, style="dim"), "", *_layers(detailed))


def _circumstances(result: Result) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _circumstance_lines(result):
        table.add_row(name, Text(printable(value)))
    return table


def _circumstance_lines(result: Result) -> Iterator[tuple[str, str]]:
    yield "recipe", result["recipe"]
    compiled = ", compiled" if result["compile"] else ""
    yield "model", f"{result['model']}, {result['neurons']} neurons, {result['precision']}{compiled}"
    known = result["image_shape"]
    what = "items" if known is None else f"images of {'x'.join(map(str, known))}"
    noise = "noise in the shape of " if result["synthetic_data"] else ""
    yield "batch", f"{result['batch_size']} {what}, {noise}{result['data']}"
    yield "optimizer", result["optimizer"]
    threads = "" if "thread" in result["device"] else f", {result['threads']} CPU threads"
    yield "device", f"{result['device']}{threads}"
    yield "versions", ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    yield "format", _format(result)
    steps = f" of {result['steps_per_round']} steps" if result["steps_per_round"] > 1 else ""
    rounds = result["rounds"]
    yield "n", f"{rounds} round{'s' * (rounds > 1)}{steps}, everything by turns"


def _format(result: Result) -> str:
    names = ("contiguous", "channels_last")
    chosen = names[result["channels_last"]]
    if result["channels_last_ms"] is None:
        return f"{chosen}, as the recipe says"
    times = ", ".join(f"{name} {_short(result[f'{name}_ms'])} ms" for name in names)
    interval = result["channels_last_ratio_interval"]
    why = "for the two are within noise" if _is_noise(interval) else "the faster one of the dense step"
    return f"{chosen}, {why}: {times}, ratio {_interval(interval)}"


def _steps(result: Result) -> Iterator[RenderableType]:
    on_gpu = result["dense"]["peak_memory_bytes"] is not None
    dense = _step_table("dense, plain PyTorch", on_gpu, header=True)
    plain = {"time_ratio": 1.0, "time_ratio_interval": None, "flops_ratio": 1.0, **result["dense"]}
    dense.add_row(*_step_cells("", plain, on_gpu))
    yield dense
    for (mode, order), group in groupby(result["measurements"], lambda one: (one["backward"], one["order"])):
        table = _step_table(f"{mode}, {_ORDERS.get(order, order)}", on_gpu, header=False)
        noise = []
        for one in group:
            share = f"{one['frozen_fraction']:g}"
            is_noise = _is_noise(one["time_ratio_interval"])
            noise += [share] if is_noise else []
            table.add_row(*_step_cells(share, one, on_gpu), style="dim" if is_noise else "")
        yield table
        if noise:
            yield Text(f"within noise of the dense step: {', '.join(noise)} frozen", style="dim")
    yield ""


def _interval_legend(result: Result) -> Iterator[str]:
    """Yield what the intervals are, where the rounds were enough for any."""
    confidence = result["measurements"][0]["time_ratio_confidence"]
    if confidence is None:
        yield "interval: needs more than one round, one of 95 % needs six"
        return
    yield f"interval: of the median, by the order of the rounds' ratios; {100 * confidence:.1f} % of such"
    yield "intervals hold it, at least; within noise where it covers 1"
    if confidence < _CUSTOMARY:
        yield "--rounds 6 gives an interval of 95 %"


def _is_noise(interval: Sequence[float] | None) -> bool:
    return interval is not None and interval[0] <= 1 <= interval[1]


def _interval(interval: Sequence[float] | None) -> str:
    return MISSING if interval is None else "–".join(map(_ratio, interval))


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


_ORDERS = {"random": "a share of every layer at random", "front": "layer after layer from the input"}


def _step_table(title: str, on_gpu: bool, *, header: bool) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=header,
        header_style="dim", padding=(0, 1, 0, 0),
    )  # fmt: skip
    widths = {
        "frozen": 6, "step ms": 7, "time": 5, "interval": 11, "FLOPs": 5, "saved": 5, "forward": 7, "backward": 8,
        "optim.": 6, "rows": 5,
    }  # fmt: skip
    for name, width in (widths | ({"peak": 5} if on_gpu else {})).items():
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    return table


def _step_cells(share: str, times: Result, on_gpu: bool) -> list[str]:
    parts = [_short(times[f"{part}_ms"]) for part in _PARTS]
    peak = [_megabytes(times["peak_memory_bytes"])] if on_gpu else []
    saved = _megabytes(times["saved_for_backward_bytes"])
    ratios = [_ratio(times["time_ratio"]), _interval(times["time_ratio_interval"]), f"{times['flops_ratio']:.3f}"]
    return [share, _short(times["step_ms"]), *ratios, saved, *parts, *peak]


def _layers(detailed: Result) -> Iterator[RenderableType]:
    layers = detailed["layers"]
    own = [layer for layer in layers if layer["kernel"] not in ("dense", "none") or _timed(layer)]
    title = f"{detailed['backward']}, {detailed['order']}, {detailed['frozen_fraction']:g} frozen, layer by layer"
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for name in ("frozen", "kernel", "rows", "why"):
        table.add_column(name, justify="left" if name in ("kernel", "why") else "right", overflow="fold")
    shown = ("frozen", "neurons", "kernel", "rows_computed", "reason")
    groups: dict[tuple[object, ...], list[str]] = {}
    for layer in own:
        groups.setdefault(tuple(layer[key] for key in shown), []).append(layer["name"])
    for (frozen, neurons, kernel, rows, reason), names in groups.items():
        name = printable(names[0]) + (f" and {len(names) - 1} alike" if names[1:] else "")
        why = printable(reason).replace(" ms, ", ", ")
        table.add_row(Text(name), f"{frozen}/{neurons}", str(kernel or MISSING), str(rows), Text(why))
    yield Text(title, style="bold")
    if own:
        yield table
    yield from _counted([layer for layer in layers if layer not in own])


def _timed(layer: Result) -> bool:
    return bool(layer["reason"].endswith(" ms"))


def _counted(layers: Sequence[Result]) -> Iterator[Text]:
    """Yield a line for each reason without a measurement, with the number of its layers; --json names them."""
    counts: dict[str, int] = {}
    for layer in layers:
        what = "no weight gradient" if layer["kernel"] == "none" else "dense"
        reason = f"{what}: {layer['reason']}"
        counts[reason] = counts.get(reason, 0) + 1
    for reason, count in counts.items():
        yield Text(f"{count} layer{'s' * (count > 1)} {printable(reason)}", style="dim")


def _short(value: float) -> str:
    """Three significant digits or, from 1000 on, all that stand before the point."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"


def _megabytes(count: int | None) -> str:
    return MISSING if count is None else _short(count / 1e6)


def render_flops(name: str, estimate: Mapping[str, Any]) -> RenderableType:
    """Return tables of ``estimate``, whose keys are those of `neq flops --json`."""
    sums = Table(box=None, pad_edge=False)
    for column in (printable(name), "FLOPs", "nothing frozen", ""):
        sums.add_column(Text(column), justify="left" if column == printable(name) else "right")
    for accounting in ("paper", "executed"):
        value, dense = estimate[f"flops_{accounting}"], estimate[f"flops_{accounting}_dense"]
        share = format_percent(ratio_percent(value, dense))
        sums.add_row(accounting, format_flops(value), format_flops(dense), share)
    layers = Table(box=None, pad_edge=False)
    for column in ("layer", "kind", "neurons", "paper", "executed"):
        layers.add_column(column, justify="left" if column in ("layer", "kind") else "right", overflow="fold")
    for layer, row in estimate["layers"].items():
        paper, executed = format_flops(row["flops_paper"]), format_flops(row["flops_executed"])
        layers.add_row(Text(printable(layer)), Text(row["kind"]), str(row["neurons"]), paper, executed)
    unit = Text("one sample's back-propagation, one multiply-add each; per layer with nothing frozen", style="dim")
    notes = [Text(f"note: {printable(note)}", style="yellow") for note in estimate.get("notes", ())]
    return Group(sums, Text(), layers, unit, *notes)
