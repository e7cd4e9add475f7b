"""Draws one checkpoint's timeline with matplotlib, as PNG or SVG.

Everything is drawn in rows of height 1, the y axis pointing down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flax_partial.cli import text
from flax_partial.cli.commands.timeline import layout
from flax_partial.errors import how_to_install
from flax_partial.runs.timeline import FINALIZED

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flax_partial.cli.commands.timeline.layout import Chart, Track
    from flax_partial.runs.timeline import Save

_STEP_COLOURS = ("#d9d9d9", "#bdbdbd")
_OWN_STEP_COLOUR = "#969696"
_HELD_COLOUR = "#d62728"
_FINALIZE_COLOUR = "#7b4ea3"
# Reds hold training; greys and blues wait; greens work for the disk.
_COLOURS = {
    layout.ENTERS: "#f4a582",
    layout.BUDGET: "#ff7f0e",
    layout.SNAPSHOT: "#a50f15",
    layout.COMPUTES: "#c6dbef",
    layout.QUEUES: "#e5e5e5",
    layout.COPIES: "#4292c6",
    layout.WRITES: "#41ab5d",
    layout.COMMITS: "#1a7a3c",
}
_ROW_INCHES, _WIDTH_INCHES, _MOST_INCHES = 0.19, 11.0, 60.0
_MOST_LABELLED = 400
_NAMED_SHARE = 0.12  # of the chart's width: what takes so much of it has room for its name
_MS_BELOW_SECS = 5.0


def draw(chart: Chart, path: Path, *, title: str) -> None:
    """Draws a chart into a file, in the format of its suffix."""
    figure = _figure(chart)
    axes = figure.subplots()
    _Drawing(axes, chart).draw()
    _explain(figure, axes, chart, title)
    figure.savefig(path, dpi=130)


def why_none() -> str:
    """Returns how to install matplotlib; empty if it is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return (
            f"matplotlib, which draws it, is not installed: {how_to_install('plot')}. A trace for "
            "Perfetto needs nothing: --out timeline.json"
        )
    return ""


def _figure(chart: Chart) -> Figure:
    from matplotlib.figure import Figure

    rows = sum(_rows(track) for track in chart.tracks)
    height = min(1.9 + _ROW_INCHES * rows, _MOST_INCHES)
    return Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")


def _rows(track: Track) -> float:
    return 3.5 + sum(len(lane.saves) + 0.5 for lane in track.lanes)


class _Drawing:
    """What is drawn where: x in seconds since the chart began, y in rows."""

    def __init__(self, axes: Axes, chart: Chart) -> None:
        self._axes = axes
        self._chart = chart
        span = chart.ended_at - chart.began_at
        self._unit = 1e3 if span < _MS_BELOW_SECS else 1.0
        self._right = span * self._unit
        self._y = 0.0
        self._ticks: list[tuple[float, str]] = []
        groups = sum(len(track.saves) for track in chart.tracks)
        self._is_labelled = groups <= _MOST_LABELLED

    def draw(self) -> None:
        """Draws all."""
        for track in self._chart.tracks:
            self._draw_track(track)
        axes = self._axes
        axes.set_ylim(self._y, 0)
        axes.set_xlim(0, self._right * 1.17)
        axes.set_yticks([y for y, _ in self._ticks], [name for _, name in self._ticks])
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="x", color="#80808022", zorder=0)
        axes.set_axisbelow(True)
        unit = "ms" if self._unit > 1 else "s"
        axes.set_xlabel(f"{unit} since step {self._chart.step} began")

    def _draw_track(self, track: Track) -> None:
        self._draw_steps(track)
        for lane in track.lanes:
            self._ticks.append((self._y + len(lane.saves) / 2, lane.title))
            for save in lane.saves:
                self._draw_save(save)
            self._axes.axhline(self._y + 0.25, color="#80808066", lw=0.6)
            self._y += 0.5
        self._draw_end(track)

    def _draw_steps(self, track: Track) -> None:
        for step in track.steps:
            colour = _STEP_COLOURS[step.number % 2]
            if step.number == self._chart.step:
                colour = _OWN_STEP_COLOUR
            left, width = self._bar((step.began_at, step.ended_at), 1.3, colour)
            self._text(left + width / 2, f"{step.number}", 0.65, ha="center", color="black")
        for hold in track.holds:
            left, width = self._bar((hold.began_at, hold.ended_at), 0.6, _HELD_COLOUR, shift=0.7)
            if width > _NAMED_SHARE * self._right:
                self._text(left + width / 2, hold.hook, 1.0, ha="center", color="white")
        self._ticks.append((self._y + 0.7, "training steps"))
        self._y += 1.7

    def _draw_save(self, save: Save) -> None:
        for phase in layout.phases(save.times):
            span = (phase.began_at, phase.ended_at)
            self._bar(span, 0.8, _COLOURS[phase.name], shift=0.1)
        if self._is_labelled:
            at = (save.times.committed_at - self._chart.began_at) * self._unit
            size = text.size(save.bytes)
            self._text(at + self._right * 0.006, f"{save.group}  ({size})", 0.5)
        self._y += 1

    def _draw_end(self, track: Track) -> None:
        end = track.end
        if end is not None:
            left, width = self._bar((end.began_at, end.ended_at), 0.8, _FINALIZE_COLOUR, shift=0.1)
            said = f"checkpoint {end.step} is there" if end.outcome == FINALIZED else end.outcome
            self._text(left + width + self._right * 0.006, said, 0.5)
        self._ticks.append((self._y + 0.5, "finalize"))
        self._y += 1.5

    def _bar(
        self, span: tuple[float, float], height: float, colour: str, *, shift: float = 0.0
    ) -> tuple[float, float]:
        """Draws a bar in this row, as far as the chart goes; returns its left end and width."""
        left, right = (
            min(max((at - self._chart.began_at) * self._unit, 0.0), self._right) for at in span
        )
        self._axes.broken_barh(
            [(left, right - left)], (self._y + shift, height), facecolors=colour, linewidth=0
        )
        return left, right - left

    def _text(self, x: float, said: str, y: float, **kind: Any) -> None:
        self._axes.text(x, self._y + y, said, va="center", fontsize=7, clip_on=True, **kind)


def _explain(figure: Figure, axes: Axes, chart: Chart, title: str) -> None:
    from matplotlib.patches import Patch

    saves = [save for track in chart.tracks for save in track.saves]
    seen = {phase.name for save in saves for phase in layout.phases(save.times)}
    handles = [
        Patch(facecolor=_STEP_COLOURS[0], label="training step"),
        Patch(facecolor=_HELD_COLOUR, label="training held"),
        *(Patch(facecolor=_COLOURS[p], label=f"group {p}") for p in layout.PHASES if p in seen),
        Patch(facecolor=_FINALIZE_COLOUR, label="finalize"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    axes.set_title(title, loc="left", fontsize=10)
