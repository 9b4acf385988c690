"""The pictures of a report, drawn on figures of their own and never through pyplot: tasks may draw side by side."""

import itertools
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from gptcore.evaluation.intervals import Interval

_INK, _QUIET, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
# The model first, in a colour; what it is compared with in greys.
_SERIES = ("#2563eb", "#9ca3af", "#d1d5db", "#4b5563")
_SIGNAL = "#dc2626"
_LINES = (_SERIES[0], _SIGNAL, "#059669", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#65a30d")
_BLUES = LinearSegmentedColormap.from_list("blues", ["#f8fafc", "#bfdbfe", "#2563eb", "#1e3a8a"])
_MOST_NUMBERED_LABELS = 24
_MOST_TICKS = 6
_DPI = 150


class Curve(NamedTuple):
    """A line of a panel: its values over the steps."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    noisy: bool = False
    """Draw the running mean, and the values themselves faintly."""


class Panel(NamedTuple):
    """A small plot over the steps: what it shows and its lines."""

    title: str
    curves: Sequence[Curve]
    from_zero: bool = False
    """Let the vertical axis begin at zero."""


def bars(png: Path, groups: Mapping[str, Mapping[str, Interval]], *, title: str, note: str) -> None:
    """Horizontal bars with their 95 % intervals: per group (a source, a metric) one bar per series, the model first."""
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    thickness = 0.8 / len(series)
    figure = _figure(9, 1.6 + (0.36 * len(series) + 0.12) * len(groups))
    axes = _axes(figure, title, note)
    longest = max(max(entry.value, entry.high) for group in groups.values() for entry in group.values()) or 1.0
    for row, group in enumerate(groups.values()):
        for name, entry in group.items():
            number = series.index(name)
            place, first = row + (number - (len(series) - 1) / 2) * thickness, number == 0
            axes.barh(place, entry.value, thickness * 0.88, color=_SERIES[number % len(_SERIES)], zorder=2)
            if entry.high > entry.low:
                axes.plot([entry.low, entry.high], [place, place], color=_INK, linewidth=1.4, zorder=3)
                axes.plot([entry.low, entry.high], [place, place], "|", color=_INK, markersize=5, zorder=3)
            axes.text(
                max(entry.value, entry.high) + 0.012 * longest, place, f"{entry.value:.3f}", va="center", fontsize=9.5,
                color=_INK if first else _QUIET, fontweight="bold" if first else "normal",
            )  # fmt: skip
    axes.set_yticks(range(len(groups)), _legible(list(groups)), fontsize=10, color=_INK)
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.set_xlim(0, longest * 1.1)
    axes.xaxis.grid(True, color=_GRID, zorder=0)
    handles = [Patch(color=_SERIES[i % len(_SERIES)], label=name) for i, name in enumerate(series)]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(series), frameon=False, fontsize=9.5)
    figure.savefig(png, dpi=_DPI)


def confusion(png: Path, counts: ArrayLike, labels: Sequence[str], *, title: str) -> None:
    """Confusion matrix (L, L), a line per true label and a column per answer; shaded by the share of its line."""
    matrix = np.asarray(counts, dtype=np.float64)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1.0)
    size = float(np.clip(2.2 + 0.5 * len(labels), 4.5, 14.0))
    figure = _figure(size + 1.2, size)
    axes = _axes(figure, title, "shade: share of the true label's rows; number: rows")
    image = axes.imshow(share, cmap=_BLUES, vmin=0.0, vmax=1.0)
    names = _legible(labels)
    font = 10 if len(labels) <= 12 else 8 if len(labels) <= _MOST_NUMBERED_LABELS else 5
    axes.set_xticks(range(len(labels)), names, fontsize=font, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), names, fontsize=font)
    axes.set_xlabel("answer", color=_QUIET)
    axes.set_ylabel("true label", color=_QUIET)
    if len(labels) <= _MOST_NUMBERED_LABELS:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                color = "white" if share[row, column] > 0.45 else _INK
                axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=font, color=color)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, format=FuncFormatter(lambda value, _: f"{value:.0%}"))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0, labelcolor=_QUIET)
    figure.savefig(png, dpi=_DPI)


def distribution(
    png: Path,
    series: Mapping[str, ArrayLike],
    *,
    title: str,
    note: str,
    unit: str,
    rows: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """How one number per row is spread: a histogram per series over common bins, its mean as a dashed line.

    Without `limits` the farthest half percent at each end stands in the outermost bins, so that one odd row does not
    flatten the rest.
    """
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in series.items() if len(np.asarray(values))}
    low, high = limits or np.quantile(np.concatenate(list(columns.values())), [0.005, 0.995])
    bins = int(np.clip(2 * max(map(len, columns.values())) ** 0.5, 8, 30))
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    figure = _figure(9, 4.2)
    axes = _axes(figure, title, note)
    for place, (name, values) in enumerate(columns.items()):
        color = (_SERIES[0], _INK)[place % 2]
        mean = values.mean()
        style: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.8} if place == 0 else {"histtype": "step"}
        clipped, label = np.clip(values, edges[0], edges[-1]), f"{name} (mean {mean:.3f})"
        axes.hist(clipped, edges.tolist(), color=color, linewidth=1.5, label=label, zorder=2 + place, **style)
        axes.axvline(mean, color=color, linestyle=(0, (4, 3)), linewidth=1.3, zorder=4)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel(unit, color=_QUIET)
    axes.set_ylabel(rows, color=_QUIET)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.grid(True, color=_GRID, zorder=0)
    figure.legend(loc="outside lower left", ncols=len(columns), frameon=False, fontsize=9.5, labelcolor=_INK)
    figure.savefig(png, dpi=_DPI)


def curves(png: Path, panels: Sequence[Panel], *, title: str) -> None:
    """Small plots over the steps, two in a row."""
    lines = -(-max(len(panels), 1) // 2)
    figure = _figure(11, 0.5 + 3.1 * lines)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    if not panels:
        figure.text(0.5, 0.4, "no step has been measured yet", ha="center", color=_QUIET)
    for number, panel in enumerate(panels, 1):
        axes = _axes(figure, panel.title, "", place=(lines, 2, number))
        for curve, color in zip(panel.curves, itertools.cycle(_LINES), strict=False):
            _line(axes, curve, color)
        if panel.from_zero:
            axes.set_ylim(0, max(max(curve.values) for curve in panel.curves) * 1.08 or 1.0)
        axes.set_xlabel("step", color=_QUIET, fontsize=9)
        axes.yaxis.grid(True, color=_GRID, zorder=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(panel.curves) > 1:
            axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    figure.savefig(png, dpi=_DPI)


def _line(axes: Axes, curve: Curve, color: str) -> None:
    """Few points are marked; of many noisy ones the running mean is drawn strongly."""
    values = np.asarray(curve.values, dtype=np.float64)
    strong: dict[str, Any] = {"color": color, "linewidth": 1.8, "label": curve.name, "zorder": 4}
    if len(values) <= 40:
        axes.plot(curve.steps, values, marker="o", markersize=3.5, **strong)
    elif not curve.noisy:
        axes.plot(curve.steps, values, **strong)
    else:
        axes.plot(curve.steps, values, color=color, linewidth=0.8, alpha=0.3, zorder=2)
        axes.plot(curve.steps, _running_mean(values, len(values) // 50), **strong)


def _running_mean(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Mean of each value and up to `reach` neighbours on both sides."""
    total = np.concatenate(([0.0], np.cumsum(np.nan_to_num(values))))
    place = np.arange(len(values))
    begin, end = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    mean: NDArray[np.float64] = (total[end] - total[begin]) / (end - begin)
    return mean


def _figure(width: float, height: float) -> Figure:
    """An empty page of that many inches, with a margin all around."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))


def _axes(figure: Figure, title: str, note: str, place: tuple[int, int, int] = (1, 1, 1)) -> Axes:
    """Axes with a title that begins at the left, a quiet note under it and no box."""
    axes = figure.add_subplot(*place)
    size, pad = (13 if place == (1, 1, 1) else 11), (24 if note else 8)
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold", color=_INK, pad=pad)
    if note:
        axes.annotate(note, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", fontsize=9.5, color=_QUIET)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=_QUIET)
    axes.set_axisbelow(True)
    return axes


def _legible(names: Sequence[str]) -> list[str]:
    """Names as far as the plot's font can write them; the others by their number, as a table lists them."""
    known = _known_characters()
    return [
        _short(name) if all(ord(character) in known for character in name) else f"#{number}"
        for number, name in enumerate(names, 1)
    ]


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


@cache
def _known_characters() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


class Slice(NamedTuple):
    """The trials of a sweep along one setting: what it was in each of them."""

    title: str
    places: Sequence[float | int | str]
    log: bool = False


def trials(png: Path, numbers: Sequence[int], values: Sequence[float], slices: Sequence[Slice], best: int, unit: str) -> None:
    """What each trial of a sweep is judged by: over the trials, and along every setting; `best` is its place in `values`."""
    lines = -(-(len(slices) + 1) // 2)
    figure = _figure(11, 0.5 + 3.1 * lines)
    for number, part in enumerate([Slice("Trials in their order", numbers), *slices], 1):
        axes = _axes(figure, part.title, "", place=(lines, 2, number))
        places = _along(axes, part)
        axes.plot(places, values, "o", color=_SERIES[0], alpha=0.7, markersize=6, zorder=3)
        axes.plot([places[best]], [values[best]], "o", color=_SIGNAL, markersize=9, zorder=4)
        axes.set_ylabel(unit, color=_QUIET, fontsize=9)
        axes.yaxis.grid(True, color=_GRID, zorder=0)
    figure.savefig(png, dpi=_DPI)


def _along(axes: Axes, part: Slice) -> list[float | int]:
    """Where its values stand on the horizontal axis, which is labelled for them."""
    places = [place for place in part.places if not isinstance(place, str)]
    if len(places) < len(part.places):  # names, in the order in which they first came
        names = list(dict.fromkeys(map(str, part.places)))
        axes.set_xticks(range(len(names)), _legible(names), fontsize=9)
        return [names.index(str(place)) for place in part.places]
    if part.log:
        axes.set_xscale("log")
    ticks = sorted(set(places))
    if len(ticks) <= _MOST_TICKS:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=9)
        axes.minorticks_off()
    elif all(isinstance(place, int) for place in places):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return places
