"""Figures as inline SVG that takes its colours from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dermfm.report.tables import Gap

# Placeholder colours that become CSS variables of the page.
INK, SOFT, RULE = "#010203", "#010204", "#010205"
SERIES = ("#020301", "#020302", "#020303", "#020304")
_CSS = {INK: "var(--ink)", SOFT: "var(--soft)", RULE: "var(--rule)"} | {
    colour: f"var(--series-{i + 1})" for i, colour in enumerate(SERIES)
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dermfm",
    "font.size": 9.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}
WIDTH, HEIGHT = 3.6, 2.5  # inches of one small figure


def training_figures(curves: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, SVG) of loss, every objective, learning rate and speed over samples seen, where the log has them."""
    keys = list(dict.fromkeys(k for row in curves for k in row))
    wanted = [("loss", "Loss, all objectives")]
    wanted += [(k, f"Loss, {k.removeprefix('loss/')}") for k in keys if k.startswith("loss/")]
    wanted += [("lr", "Learning rate"), ("samples_per_s", "Samples per second")]
    out = []
    for name, title in wanted:
        points = [(r.get("samples_seen", r["step"]), r[name]) for r in curves if isinstance(r.get(name), int | float)]
        if len(points) > 1:
            out.append((title, _draw(lambda axes, p=points: _curve(axes, p), title)))
    return out


def gap_figure(gaps: Sequence[Gap]) -> str:
    """SVG: a line from the external to the internal value for every method, one group a metric."""

    def draw(axes: Axes) -> None:
        methods = list(dict.fromkeys(g.method for g in gaps))
        for place, gap in enumerate(gaps):
            colour = SERIES[methods.index(gap.method) % len(SERIES)]
            axes.plot([gap.external, gap.internal], [place, place], color=colour, linewidth=2)
            axes.plot(gap.external, place, "o", color=colour, markersize=5, markerfacecolor="none")
            axes.plot(gap.internal, place, "o", color=colour, markersize=5)
        axes.set_yticks(range(len(gaps)), [f"{g.metric}, {g.method}" for g in gaps])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("open: external · filled: internal")

    return _draw(draw, "shift gap", 6.4, 0.34 * len(gaps) + 0.9)


def histogram_figure(title: str, unit: str, series: Mapping[str, Sequence[float]], bins: int = 30) -> str:
    """SVG: the distribution of one value for each series, as shares of the series so that sizes compare."""

    def draw(axes: Axes) -> None:
        known = {name: np.asarray(values, float) for name, values in series.items() if len(values)}
        low, high = (np.quantile(np.concatenate([*known.values()]), q) for q in (0.002, 0.998))
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
        for colour, (name, values) in zip(SERIES, known.items(), strict=False):
            counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
            axes.stairs(counts / len(values), edges, color=colour, linewidth=1.4, label=f"{name} ({len(values)})")
        axes.set_xlabel(unit)
        axes.margins(x=0.01)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(fontsize=8)

    return _draw(draw, title)


def bar_figure(title: str, names: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """SVG: a share for every name, one bar a series."""

    def draw(axes: Axes) -> None:
        height = 0.8 / max(len(series), 1)
        for i, (colour, (name, shares)) in enumerate(zip(SERIES, series.items(), strict=False)):
            axes.barh(np.arange(len(names)) + i * height, shares, height * 0.9, color=colour, label=name)
        axes.set_yticks(np.arange(len(names)) + 0.4 - height / 2, list(names))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(fontsize=8)

    return _draw(draw, title)


def _curve(axes: Axes, points: list[tuple[float, float]]) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=SERIES[0], linewidth=1.4)
    axes.set_xlabel("samples seen")
    axes.margins(x=0.01)


def _draw(draw: Any, label: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        try:
            draw(axes)
            return _inline(figure, label)
        finally:
            plt.close(figure)


def _inline(figure: Figure, label: str) -> str:
    """The figure as an <svg> element of relative width, its placeholder colours replaced by the page's."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _CSS.items():
        text = text.replace(colour, variable)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text, count=1
    )
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
