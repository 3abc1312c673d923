"""Figures as inline SVG that takes its colours from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import functools
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dermfm.report.verdicts import MARGIN

if TYPE_CHECKING:
    from dermfm.report.breakdown import Bar, Reliability
    from dermfm.report.tables import Gap
    from dermfm.report.verdicts import Effect

# Placeholder colours that become CSS variables of the page.
INK, SOFT, RULE = "#010203", "#010204", "#010205"
SERIES = tuple(f"#02030{i}" for i in range(1, 9))
MARKERS = "os^DvPX*"  # shape tells what colour tells, for those who see some colours alike
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
    "axes.axisbelow": True,
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
            out.append((title, draw(functools.partial(_curve, points=points), title)))
    return out


def gap_figure(gaps: Sequence[Gap], label: str = "internal and external value of every method") -> str:
    """SVG: a line from the external to the internal value for every method, one group a metric."""

    def paint(axes: Axes) -> None:
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

    return draw(paint, label, 6.4, 0.34 * len(gaps) + 0.9)


def reliability_figure(one: Reliability) -> str:
    """SVG: accuracy over confidence in each bin, the diagonal of perfect calibration, and where the answers lie."""

    def paint(axes: Axes) -> None:
        bins = len(one.counts)
        edges, used = np.arange(bins) / bins, one.counts > 0
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.bar(edges[used], one.accuracy[used], 1 / bins, align="edge", color=SERIES[0], alpha=0.35, linewidth=0)
        sizes = 8 + 60 * one.counts[used] / one.counts.max()
        axes.scatter(one.confidence[used], one.accuracy[used], s=sizes, color=SERIES[0], linewidths=0, zorder=3)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        above = axes.inset_axes((0, 1.03, 1, 0.16), sharex=axes)
        above.bar(edges, one.counts / max(one.counts.sum(), 1), 1 / bins, align="edge", color=SOFT, linewidth=0)
        above.set_axis_off()

    label = f"reliability diagram, {one.method}, {one.scope}: calibration error {one.ece:.3f} over {one.n} answers"
    return draw(paint, label, 3.0, 3.0)


def interval_bars(label: str, names: Sequence[str], series: Mapping[str, Sequence[Bar]], unit: str) -> str:
    """SVG: a bar with its interval for every name and series; n is written beside it, a missing value leaves a gap."""

    def paint(axes: Axes) -> None:
        height = 0.8 / max(len(series), 1)
        for i, (name, bars) in enumerate(series.items()):
            known = [(k, bar) for k, bar in enumerate(bars) if bar.value is not None]
            at = np.array([k + i * height for k, _ in known])
            values = np.array([bar.value for _, bar in known], float)
            axes.barh(at, values, height * 0.86, color=SERIES[i % len(SERIES)], alpha=0.75, label=name, linewidth=0)
            for y, (_, bar) in zip(at, known, strict=True):
                if bar.low is not None and bar.high is not None:
                    axes.plot([bar.low, bar.high], [y, y], color=INK, linewidth=1)
                end = max(bar.high or 0, bar.value or 0)
                axes.text(end + 0.012, y, f"n = {bar.n}", va="center", fontsize=7, color=SOFT)
        axes.set_yticks(np.arange(len(names)) + 0.4 - height / 2, list(names))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)

    return draw(paint, label, 4.6, max(0.9, len(names) * (0.16 + 0.19 * len(series))) + 0.9)


def map_figure(label: str, points: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> str:
    """SVG: points [n, 2] coloured and shaped by their group [n] (a place in `names`; −1 is drawn faintly)."""

    def paint(axes: Axes) -> None:
        for i in (-1, *range(len(names))):
            own = points[groups == i]
            if len(own):
                colour, marker = (RULE, ".") if i < 0 else (SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)])
                name = "unknown" if i < 0 else names[i]
                x, y = own[:, 0], own[:, 1]
                axes.scatter(x, y, s=9, marker=marker, color=colour, alpha=0.8, linewidths=0, label=name)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_aspect("equal", adjustable="datalim")
        columns = 4 if max(map(len, names), default=0) < 8 else 2
        axes.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns, markerscale=1.8, handletextpad=0.2
        )

    wide, high = np.ptp(points, axis=0)
    return draw(paint, label, 4.6, float(np.clip(4.4 * high / max(wide, 1e-6), 2.4, 4.6)) + 0.5)


def forest_figure(label: str, effects: Sequence[Effect], reach: float) -> str:
    """SVG: every strategy's difference with its interval, every seed's own difference as a small stroke; zero marked.

    The axis goes from −reach to reach, so that figures compare.
    """

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=SOFT, linewidth=0.9)
        axes.axvspan(-MARGIN, MARGIN, color=RULE, alpha=0.5, linewidth=0)
        for place, effect in enumerate(effects):
            colour = {"better": SERIES[0], "worse": SERIES[1]}.get(effect.verdict, SOFT)
            if effect.ci_low is not None and effect.ci_high is not None:
                axes.plot([effect.ci_low, effect.ci_high], [place, place], color=colour, linewidth=2)
            axes.plot(list(effect.seeds), [place + 0.28] * len(effect.seeds), "|", color=colour, markersize=6)
            fill = colour if effect.verdict in ("better", "worse") else "none"
            axes.plot(effect.difference, place, "o", color=colour, markersize=6, markerfacecolor=fill)
        axes.set_xlim(-reach, reach)
        axes.set_yticks(range(len(effects)), [e.strategy for e in effects])
        axes.set_ylim(len(effects) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("difference in macro F1, mean over external data sets")

    told = "; ".join(f"{e.strategy} {e.difference:+.3f} ({e.verdict})" for e in effects)
    return draw(paint, f"{label}: {told}", 6.4, 0.42 * len(effects) + 0.8)


def seeds_figure(lines: Sequence[tuple[str, Sequence[float]]]) -> str:
    """SVG: the endpoint of every seed as a point and their mean as a bar, a row for each strategy."""

    def paint(axes: Axes) -> None:
        for place, (_, values) in enumerate(lines):
            axes.plot(
                list(values), [place] * len(values), "o", color=SERIES[0], markersize=4.5, alpha=0.7, markeredgewidth=0
            )
            axes.plot([float(np.mean(values))] * 2, [place - 0.32, place + 0.32], color=INK, linewidth=1.6)
        axes.set_yticks(range(len(lines)), [name for name, _ in lines])
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_xlabel("macro F1, mean over external data sets; a point a seed, the bar their mean")

    return draw(paint, "endpoint of every strategy and seed", 6.4, 0.34 * len(lines) + 0.8)


def histogram_figure(title: str, unit: str, series: Mapping[str, Sequence[float]], bins: int = 30) -> str:
    """SVG: the distribution of one value for each series, as shares of the series so that sizes compare."""

    def paint(axes: Axes) -> None:
        known = {name: np.asarray(values, float) for name, values in series.items() if len(values)}
        low, high = (np.quantile(np.concatenate([*known.values()]), q) for q in (0.002, 0.998))
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
        if high - low <= bins and all((values % 1 == 0).all() for values in known.values()):
            edges = np.arange(np.floor(low), np.ceil(high) + 2) - 0.5  # counts: no empty bins between them
        for colour, (name, values) in zip(SERIES, known.items(), strict=False):
            counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
            axes.stairs(counts / len(values), edges, color=colour, linewidth=1.4, label=f"{name} ({len(values)})")
        axes.set_xlabel(unit)
        axes.margins(x=0.01)
        axes.set_ylim(0, axes.get_ylim()[1] * (1.1 + 0.08 * len(known)))  # room for the legend above the bars
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(fontsize=8, loc="upper right")

    return draw(paint, title)


def bar_figure(title: str, names: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """SVG: a share for every name, one bar a series."""

    def paint(axes: Axes) -> None:
        height = 0.8 / max(len(series), 1)
        for i, (colour, (name, shares)) in enumerate(zip(SERIES, series.items(), strict=False)):
            axes.barh(np.arange(len(names)) + i * height, shares, height * 0.9, color=colour, label=name)
        axes.set_yticks(np.arange(len(names)) + 0.4 - height / 2, list(names))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(fontsize=8)

    return draw(paint, title)


def _curve(axes: Axes, points: list[tuple[float, float]]) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=SERIES[0], linewidth=1.4)
    axes.set_xlabel("samples seen")
    axes.margins(x=0.01)


def draw(paint: Callable[[Axes], None], label: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    """The SVG of a figure of width × height inches that `paint` fills; `label` tells it to those who do not see it."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        try:
            paint(axes)
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
    view = re.search(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', text)
    assert view is not None
    told = html.escape(label)
    text = text.replace(view[0], f'<svg viewBox="{view[1]}" role="img" aria-label="{told}">', 1)
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
