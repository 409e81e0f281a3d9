"""The report as one HTML page: no scripts, nothing fetched, readable offline; the same runs give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from neq_cli import __version__
from neq_cli.errors import NeqError
from neq_cli.runs.compare.configurations import model_and_data
from neq_cli.runs.compare.curves import Configuration, Study, axis_word, study
from neq_cli.runs.store.disk import atomic_write
from neq_cli.runs.store.run import Run
from neq_cli.runs.views.report.axes import unit_of
from neq_cli.runs.views.report.drawing import MARK, PAGE, drawn, require_matplotlib
from neq_cli.runs.views.report.files import check_replaceable
from neq_cli.runs.views.report.html import bullets, element, inline, legend, swatch, text
from neq_cli.runs.views.report.names import capital, metric_in_words
from neq_cli.runs.views.report.pictures import (
    MOST_DENSITIES,
    MOST_MAPS,
    Picture,
    freezing,
    line,
    observed,
    pictures,
)
from neq_cli.runs.views.report.tables import comparison_table, environment_tables, notes, recipe_tables, runs_table
from neq_cli.runs.views.report.words import Fact, caveats, facts, reading
from neq_cli.text import counted, printable, some_of

_MOST_CARDS = 8
# No script runs and nothing is fetched, whatever a run's texts might say.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Report:
    """A study with its figures, read once for the page and the files."""

    study: Study
    pictures: tuple[Picture, ...]


def build_report(runs: Sequence[Run], baseline: Run | None = None, allow_differences: bool = False) -> Report:
    """Read all that a report shows. NeqError where matplotlib is missing and as ``compare_runs``.

    RunDirectoryError for damaged files.
    """
    require_matplotlib()
    the_study = study(runs, baseline, allow_differences)
    return Report(the_study, tuple(pictures(the_study)))


def write_page(path: Path, page: str) -> None:
    """Write a page atomically. NeqError where a file is there that neq report did not write, or the disk refuses."""
    try:
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, page.encode())
    except OSError as error:
        reason = printable(error.strerror or error)
        raise NeqError(f"{printable(path)}: cannot be written: {reason}; choose another with -o") from error


def render_page(report: Report) -> str:
    """Return the page of a report."""
    the_study = report.study
    names = dict.fromkeys(printable(run.recipe_name, 60) for run in the_study.runs)
    title = some_of(names, 4)
    sections = [
        ("short", "In short", _short(the_study)),
        ("comparison", "Comparison", comparison_table(the_study)),
        ("flops", f"{_quality(the_study)} against FLOPs", _group(report, "points", dot=True)),
        ("epochs", f"By {axis_word(the_study.runs)}", _curves(report)),
        ("layers", "Frozen share by layer", _layers(report)),
        ("neurons", "Distributions over neurons", _neurons(report)),
        ("recipes", "Recipes", recipe_tables(the_study)),
        ("environment", "Environment and notes", environment_tables(the_study) + notes(the_study)),
        ("runs", "Runs", runs_table(the_study)),
    ]
    shown = [(identity, heading, content) for identity, heading, content in sections if content]
    navigation = "".join(element("a", heading, href=f"#{identity}") for identity, heading, _ in shown)
    body = "".join(
        element(
            "section",
            element("h2", heading, id=f"{identity}-title") + content,
            id=identity,
            aria_labelledby=f"{identity}-title",
        )
        for identity, heading, content in shown
    )
    header = element("h1", text(title)) + element("p", _subtitle(the_study), class_="subtitle")
    header += element("nav", navigation, aria_label="Sections")
    footer = element(
        "footer",
        element(
            "p",
            f"neq {text(__version__)}. FLOPs: one sample's back-propagation, one multiply-add each.{_unit(the_study)}",
        ),
    )
    return _document(title, element("header", header) + element("main", body) + footer)


def _unit(the_study: Study) -> str:
    size, prefix = unit_of([the_study.largest_flops])
    return f" {prefix.strip(' ()')}: {size:,.0f} of them." if prefix else ""


def _quality(the_study: Study) -> str:
    """Return what the metric is called in a heading: a task's own has its own name."""
    metrics = {row.metric for row in the_study.comparison.rows}
    return text(capital(metric_in_words(metrics.pop()))) if len(metrics) == 1 else "Metric"


def _document(title: str, body: str) -> str:
    styles = (files(__package__) / "page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{MARK}">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)} – neq report</title>\n<style>\n{styles}</style>\n"
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _subtitle(the_study: Study) -> str:
    what = some_of(dict.fromkeys(model_and_data(run) for run in the_study.runs), 3)
    runs, configurations = len(the_study.runs), len(the_study.configurations)
    counts = f"{counted(runs, 'run')} of {counted(configurations, 'configuration')}"
    longest: dict[str, int] = {}
    for configuration in the_study.configurations:
        longest[configuration.unit] = max(longest.get(configuration.unit, 0), configuration.epochs)
    rows = " and ".join(counted(number, unit) for unit, number in longest.items())
    return text(f"{what}; {counts}, {rows}")


def _short(the_study: Study) -> str:
    baseline = the_study.baseline
    others = [configuration for configuration in the_study.configurations if configuration is not baseline]
    shown = (others or list(the_study.configurations))[:_MOST_CARDS]
    lead = (
        f"Beside {element('strong', text(baseline.name))}:"
        if baseline is not None and others
        else "There is no baseline to compare with, so these are absolute numbers:"
    )
    left = len(others) - len(shown)
    are = "is" if left == 1 else "are"
    more = f"{counted(left, 'more configuration')} {are} in the table below." if left > 0 else ""
    cards = "".join(_card(the_study, configuration) for configuration in shown)
    return (
        element("p", lead)
        + element("div", cards, class_="cards")
        + (element("p", element("small", text(reading(the_study), 600))) if reading(the_study) else "")
        + (element("p", more) if more else "")
        + element("h3", "What to keep in mind")
        + bullets(text(caveat, 500) for caveat in caveats(the_study))
    )


def _card(the_study: Study, configuration: Configuration) -> str:
    head = f"{swatch(line(the_study, configuration), dot=True)} {configuration.number}&ensp;{text(configuration.name)}"
    rows = "".join(map(_fact, facts(configuration, the_study.baseline, the_study.largest_flops)))
    return element("article", element("h3", head) + element("dl", rows), class_="card")


def _fact(fact: Fact) -> str:
    # How wide the spread is belongs to the number: as large as it, and grey with it.
    spread = " " + element("span", text(f"({fact.spread})"), class_="spread") if fact.spread else ""
    value = element("b", text(fact.value) + spread, class_="known" if fact.certain else "noise")
    detail = " " + element("small", text(fact.detail)) if fact.detail else ""
    return element("div", element("dt", text(fact.name)) + element("dd", value + detail))


def _group(report: Report, section: str, dot: bool = False) -> str:
    """Return the figures of a section under their common legend."""
    found = [picture for picture in report.pictures if picture.section == section]
    if not found:
        return ""
    captions = dict.fromkeys(picture.caption for picture in found)
    key = legend(found[0].legend, dot) if found[0].legend else ""
    # What holds for all figures is said once.
    common = next(iter(captions)) if len(captions) == 1 else ""
    intro = element("p", text(common)) if common else ""
    drawings = "".join(_figure(picture, "" if common else picture.caption) for picture in found)
    return key + intro + element("div", drawings, class_="figures three" if len(found) == 3 else "figures")


def _figure(picture: Picture, caption: str) -> str:
    name = "figure-" + "".join(character if character.isalnum() else "-" for character in picture.name)
    svg = drawn(picture.draw, PAGE, picture.height, picture.name, "svg")
    drawing = inline(svg, printable(picture.title, 300), printable(picture.summary, 2000), name)
    heading = element("p", text(picture.title), class_="title")
    return element("figure", heading + drawing + (element("figcaption", text(caption, 600)) if caption else ""))


def _curves(report: Report) -> str:
    sections = dict.fromkeys(picture.section for picture in report.pictures if picture.section.startswith("curves"))
    several = any(len(configuration.runs) > 1 for configuration in report.study.configurations)
    note = "Lines: mean over seeds; bands: from the lowest to the highest run." if several else ""
    return (element("p", note) if note else "") + "".join(_group(report, section) for section in sections)


def _layers(report: Report) -> str:
    of_all = freezing(report.study)
    content = _group(report, "layers")
    if not content:
        return element("p", "No run ever froze a neuron.")
    still = len(report.study.configurations) - len(of_all)
    remarks = (
        [f"{counted(still, 'configuration')} that froze nothing {'is' if still == 1 else 'are'} not drawn."]
        if still
        else []
    )
    if len(of_all) > MOST_MAPS:
        remarks.append(f"The first {MOST_MAPS} of {len(of_all)} configurations.")
    return (element("p", " ".join(remarks)) if remarks else "") + content


def _neurons(report: Report) -> str:
    of_all = observed(report.study)
    remark = f"The first {MOST_DENSITIES} of {len(of_all)} configurations." if len(of_all) > MOST_DENSITIES else ""
    parts = [element("p", remark)] if remark else []
    for configuration in of_all[:MOST_DENSITIES]:
        run = configuration.runs[0]
        of_several = f", the first of {len(configuration.runs)} runs" if len(configuration.runs) > 1 else ""
        heading = f"{configuration.number}  {configuration.name}, seed {printable(run.setting('seed'), 20)}{of_several}"
        parts.append(element("h3", text(heading)) + _group(report, f"neurons-{configuration.number}"))
    return "".join(parts)
