"""Draws results: the medians, and how far each target is from being missed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import UNITS, cell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.report import Result

_STYLE = Path(__file__).resolve().parents[1] / "docs" / "matplotlibrc"
_MIB = 1 << 20
_DPI = 120
_LEAST_RATIO = 1e-3  # what is nothing, or less, cannot be drawn
_OURS, _PEER, _MET, _NOT_MET = "tab:blue", "tab:gray", "tab:green", "tab:red"
_ROUND = "tab:orange"  # is seen on bars, on a light page and on a dark one


def draw(results: Sequence[Result], path: Path) -> list[Path]:
    """Draws the medians to `path`, and the targets beside it, where some were judged.

    Returns:
      What was written; nothing without matplotlib.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.stem}_targets{path.suffix}")
    with mpl.rc_context(fname=_STYLE):
        _draw_medians(results, path)
        return [path, beside] if _draw_targets(results, beside) else [path]


def _draw_medians(results: Sequence[Result], path: Path) -> None:
    """A panel a scenario: a bar for each contender's median, a dot for each of its rounds."""
    from matplotlib.figure import Figure as Drawing

    rows = [len(result["contenders"]) for result in results]
    drawing = Drawing(figsize=(9, 0.4 * sum(rows) + 1.2 * len(rows)), layout="constrained")
    panels = drawing.subplots(len(results), squeeze=False, height_ratios=rows)[:, 0]
    for result, panel in zip(results, panels, strict=True):
        _fill_panel(panel, result)
    drawing.savefig(path, dpi=_DPI)


def _fill_panel(panel: Any, result: Result) -> None:
    shown = result["shown"]
    unit = UNITS.get(shown, "seconds")
    scale = _MIB if unit == "MiB" else 1
    for name, contender in reversed(result["contenders"].items()):
        value = contender["median"][shown] or 0.0
        each = [metrics[shown] / scale for metrics in contender["rounds"] if shown in metrics]
        color = _OURS if name.startswith("flax_partial") else _PEER
        panel.barh(name, value / scale, color=color, alpha=0.7)
        panel.plot(each, [name] * len(each), ".", color=_ROUND, markersize=3)
        end = (max([value / scale, *each]), name)
        panel.annotate(
            cell(shown, value), end, xytext=(5, 0), textcoords="offset points", va="center"
        )
    panel.set_xscale("log" if unit else "linear")
    panel.set(title=result["name"], xlabel=", ".join(filter(None, (shown, unit))))
    panel.margins(x=0.2)


def _draw_targets(results: Sequence[Result], path: Path) -> bool:
    """A bar for each target, from the line that is its bound: to the right where it is met."""
    from matplotlib.figure import Figure as Drawing

    margins = [
        (f"{result['name']}: {target['text']}", _margin(target))
        for result in results
        for target in result["targets"]
        if target["is_met"] is not None
    ]
    if not margins:
        return False
    drawing = Drawing(figsize=(12, 0.3 * len(margins) + 1), layout="constrained")
    panel = drawing.subplots()
    for text, margin in reversed(margins):
        color = _MET if margin >= 1 else _NOT_MET
        bar = panel.barh(text, margin - 1, left=1, color=color)
        panel.bar_label(bar, [f"{margin:.3g}"], padding=3)
    panel.axvline(1, color="gray", linewidth=1)
    panel.set_xscale("log")
    panel.set(xlabel="times better than the bound (log)")
    panel.margins(x=0.15, y=0.01)
    drawing.savefig(path, dpi=_DPI)
    return True


def _margin(target: Result) -> float:
    """How many times better than its bound a target's ratio is; below 1 where it is missed."""
    ratio = max(target["ratio"], _LEAST_RATIO)
    inf = float("inf")
    above = inf if target["at_least"] is None else ratio / target["at_least"]
    below = inf if target["at_most"] is None else target["at_most"] / ratio
    return float(min(above, below))
