"""Matplotlib, kept in one place: styles, sizes, and figures as bytes; the same figure gives the same bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from neq_cli.errors import NeqError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["png", "svg"]
MARK = "neq report"  # in the metadata of every figure that neq wrote
# Okabe and Ito's colours, told apart by colour-blind eyes; their yellow is too faint on white.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b")
_DASHES = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)))
SERIES = len(_PALETTE)
# Colours that stand for the page's own, which replaces them by variables: no other colour is within #fe01xx.
PLACEHOLDERS = {"ink": "#fe01f0", "soft": "#fe01f1", "mean": "#fe01f2", "paper": "#fe01f3"} | {
    f"series-{number}": f"#fe01{number:02x}" for number in range(SERIES)
}


@dataclass(frozen=True)
class Style:
    """How figures look: for a page, whose colours follow the reader's theme, or for a printed column."""

    width: float  # inches
    font_size: float  # points
    line_width: float
    ink: str
    soft: str  # grids, marks
    mean: str
    paper: str
    series: tuple[str, ...]
    density: tuple[int, int, int]  # colour of 1; 0 is transparent
    legend: bool  # within the figure; a page has its own

    def colour(self, place: int) -> str:
        """The colour of a chart's line: place 0 is the baseline's."""
        return self.ink if place == 0 else self.series[(place - 1) % SERIES]

    def dashes(self, place: int) -> Any:
        """How that line is broken, so that lines are told apart in grey too."""
        return _DASHES[0] if place == 0 else _DASHES[(place - 1) % len(_DASHES)]


PRINT = Style(3.4, 7, 1.0, "#1a1a1a", "#8c8c8c", "#d55e00", "#ffffff", _PALETTE, (8, 48, 107), legend=True)
PAGE = Style(
    width=4.2,  # for letters of 11 pixels on a screen of 400, and of 12 where three stand side by side on one of 1280
    font_size=9.5,
    line_width=1.3,
    ink=PLACEHOLDERS["ink"],
    soft=PLACEHOLDERS["soft"],
    mean=PLACEHOLDERS["mean"],
    paper=PLACEHOLDERS["paper"],
    series=tuple(PLACEHOLDERS[f"series-{number}"] for number in range(SERIES)),
    density=(255, 255, 255),
    legend=False,
)


def require_matplotlib(what: str = "neq report") -> None:
    """Raise NeqError where the extra is not installed, which ``what`` needs."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "matplotlib":
            raise NeqError(f"{what} needs matplotlib; install it with: pip install 'neq[report]'") from error
        raise _broken(what, error) from error
    except ImportError as error:
        raise _broken(what, error) from error


def _broken(what: str, error: ImportError) -> NeqError:
    reason = " ".join(str(error).split())
    return NeqError(f"{what} needs matplotlib, which is there but fails to import ({reason}); install it anew")


def drawn(draw: Callable[[Figure, Style], None], style: Style, height: float, name: str, form: Format) -> bytes:
    """Draw a figure of ``style.width`` x ``height`` inches. ``name`` tells its ids from those of other figures.

    On a page, text is text; in an SVG for a paper it is drawn as shapes, so that it looks alike everywhere.
    """
    from matplotlib.figure import Figure

    with _settings(style, name):
        figure = Figure(figsize=(style.width, height), layout="constrained")
        draw(figure, style)
        content = io.BytesIO()
        if form == "svg":
            metadata = {"Creator": MARK, "Date": None, "Format": None, "Type": None}
            figure.savefig(content, format="svg", transparent=not style.legend, metadata=metadata)
        else:
            figure.savefig(content, format="png", dpi=300, metadata={"Software": MARK})
    return content.getvalue()


@contextmanager
def _settings(style: Style, name: str) -> Iterator[None]:
    """Leave the user's own matplotlib settings out of it, and as they were."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        settings: dict[Any, Any] = dict.fromkeys(colours, style.ink)
        settings.update(
            {
                "svg.hashsalt": name,
                "svg.fonttype": "path" if style.legend else "none",
                "font.size": style.font_size,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.linewidth": 0.6,
                "axes.unicode_minus": True,
                "xtick.major.width": 0.6,
                "ytick.major.width": 0.6,
                "lines.linewidth": style.line_width,
                "grid.color": style.soft,
                "grid.alpha": 0.35,
                "grid.linewidth": 0.5,
                "legend.frameon": False,
                "legend.fontsize": style.font_size,
            }
        )
        matplotlib.rcParams.update(settings)
        yield
