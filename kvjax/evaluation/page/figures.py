"""The page's figures as files, SVG and PNG, drawn from the page's data for papers and slides."""

import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text

from kvjax.evaluation.page.data import ANY, COLUMNS, LEVELS, unpack
from kvjax.evaluation.report import pareto_front

INK, MUTED, LINE, FRONT, POINT = "#1a1f26", "#5a6470", "#e3e5e3", "#b3410b", "#2b74b3"
HUES = ("#0072b2", "#b8500c", "#00785a", "#a8548a", "#8a6d00", "#3a86b8", "#6b3fa0", "#4a5560")
DASHES = ("-", "--", ":", "-.")
RAMP = LinearSegmentedColormap.from_list("kept", ["#f0f3f1", "#c5e0da", "#86c2c3", "#4597ae", "#226690", "#1a3a69"])
STYLE: Any = {
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "none",  # Text stays text.
    "svg.hashsalt": "kvjax",  # Equal figures are equal files.
}
ACROSS = 6  # Small multiples side by side.
BINS = 160  # Pieces of a prompt.


def write_figures(data: Mapping[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes every figure that the run has.

    Args:
      data: Of `page_data`.
      folder: There already.

    Returns:
      The files: pareto-bytes, pareto-speed, tasks, needles-<task>-<protocol>, drift-<job>, budgets-<job>, tokens-<job>
      and heads, each as .svg and .png; of several models those that are not of a job end in the model's name.
    """
    names: list[str] = [policy["name"] for policy in data["policies"]]
    ends = [f"-{model}" if len(data["models"]) > 1 else "" for model in data["models"]]
    drawn: dict[str, Callable[[], Figure | None]] = {}
    for model, end in enumerate(ends):
        board = data["boards"][data["keys"][f"{model}/{ANY}/{ANY}/{ANY}"]]
        for name, (key, label, scale, more) in COSTS.items():
            drawn[f"pareto-{name}{end}"] = partial(_pareto, board, names, key, label, scale, more)
        drawn[f"tasks{end}"] = partial(_tasks, data, model, names)
    for heads in data["heads"]:
        drawn[f"heads{ends[heads['model']]}"] = partial(_heads, heads)
    for needle in data["needles"]:
        stem = f"needles-{needle['task']}-{needle['protocol']}{ends[needle['model']]}"
        drawn[stem] = lambda needle=needle: _needles(needle, names)
    for drift in data["drift"]:
        drawn[f"drift-{drift['job']}"] = lambda drift=drift: _drift(drift, data["policies"])
    for kept in data["kept"]:
        drawn[f"budgets-{kept['job']}"] = lambda kept=kept: _budgets(unpack(kept["packed"]), names)
        drawn[f"tokens-{kept['job']}"] = lambda kept=kept: _tokens(unpack(kept["packed"]), names)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, draw in drawn.items():
            figure = draw()
            if figure is not None:
                written += _save(figure, folder, name)
    return written


COSTS = {
    "bytes": ("nbytes", "cache, MB (less is better)", 1e-6, False),
    "speed": ("decode_tokens_per_s", "decoding, tokens per second (more is better)", 1.0, True),
}


def _save(figure: Figure, folder: pathlib.Path, name: str) -> list[pathlib.Path]:
    stem = pathlib.PurePath(name.replace("/", "-")).name
    paths = [folder / f"{stem}.svg", folder / f"{stem}.png"]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=200)
    return paths


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _pareto(
    board: Sequence[Sequence[Any]], names: list[str], cost: str, label: str, scale: float, more: bool
) -> Figure | None:
    column = {name: i + 1 for i, name in enumerate(COLUMNS)}
    scored = any(row[column["score"]] is not None for row in board)
    key, quality, factor = ("score", "score, %", 100.0) if scored else ("perplexity", "perplexity", 1.0)
    rows = [row for row in board if row[column[key]] is not None and row[column[cost]]]
    if not rows:
        return None
    points = [(row[column[cost]] * scale, row[column[key]] * factor) for row in rows]
    figure = _figure(6.4, 4.8)
    axes = figure.add_subplot()
    x, y = (np.array(values) for values in zip(*points, strict=True))
    front = pareto_front([(-a if more else a, b) for a, b in points], more=scored)
    axes.set_xscale("log" if x.max() > 1.5 * x.min() else "linear")
    axes.step(x[front], y[front], where="post", color=FRONT, lw=1.3, alpha=0.75)
    axes.scatter(x, y, s=30, c=[FRONT if i in front else POINT for i in range(len(rows))], zorder=3, ec="w", lw=0.8)
    axes.set(xlabel=label, ylabel=quality)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=7.5)
    axes.grid(True, color=LINE, lw=0.7)
    axes.margins(0.14, 0.1)
    steps = [((a[0], a[1]), (b[0], a[1])) for a, b in itertools.pairwise(points[i] for i in front)]
    line = [point for step in steps for point in step] + [points[front[-1]]]
    _label(figure, axes, points, [names[row[0]] for row in rows], line)
    return figure


ASIDE = [(7, 0, "left", "center"), (-7, 0, "right", "center"), (0, 7, "center", "bottom"), (0, -7, "center", "top")]
ASIDE += [(5, 5, "left", "bottom"), (5, -5, "left", "top"), (-5, 5, "right", "bottom"), (-5, -5, "right", "top")]


def _label(
    figure: Figure,
    axes: Any,
    points: Sequence[tuple[float, float]],
    names: list[str],
    line: Sequence[tuple[float, float]],
) -> None:
    """Names beside their points where that place is free, best not on the line; else farther off, with a leader."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    taken = [axes.transData.transform(point) for point in points]
    ends = [axes.transData.transform(point) for point in line]
    along = [a + (b - a) * t for a, b in itertools.pairwise(ends) for t in np.linspace(0, 1, 60)]
    far = [(3 * dx, 3 * dy, ha, va) for dx, dy, ha, va in ASIDE]
    tries = [(place, taken + along) for place in ASIDE] + [(place, taken) for place in ASIDE]
    tries += [(place, taken + along) for place in far] + [(place, taken) for place in far]
    boxes: list[Any] = []
    for point, name in zip(points, names, strict=True):
        for place, obstacles in tries:
            dx, dy, ha, va = place
            text = axes.annotate(
                name,
                point,
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=7.5,
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": LINE, "lw": 0.8, "shrinkB": 3} if place in far else None,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # Without the leader.
            inside = figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1)
            around = box.padded(2.5 * figure.dpi / 72)  # Points have a size.
            free = not any(box.overlaps(b) for b in boxes) and not any(around.contains(*p) for p in obstacles)
            if inside and axes.bbox.x0 <= box.x0 and axes.bbox.y0 <= box.y0 and free:
                boxes.append(box)
                text.set_in_layout(False)
                break
            text.remove()


def _tasks(data: Mapping[str, Any], model: int, names: list[str]) -> Figure | None:
    if len(data["tasks"]) < 2:
        return None
    column = {name: i + 1 for i, name in enumerate(COLUMNS)}
    shares = np.full((len(names), len(data["tasks"])), np.nan)
    texts = [["" for _ in data["tasks"]] for _ in names]
    for t in range(len(data["tasks"])):
        key = f"{model}/{t}/{ANY}/{ANY}"
        if key not in data["keys"]:
            continue
        board = data["boards"][data["keys"][key]]
        full = board[0][column["perplexity"]]
        for row in board:
            score, perplexity = row[column["score"]], row[column["perplexity"]]
            if score is not None:
                shares[row[0], t], texts[row[0]][t] = score, f"{100 * score:.1f}"
            elif perplexity:
                shares[row[0], t], texts[row[0]][t] = full / perplexity, f"{perplexity:.2f}"
    figure = _figure(2.6 + 0.95 * len(data["tasks"]), 1.2 + 0.26 * len(names))
    axes = figure.add_subplot()
    axes.imshow(shares, cmap=RAMP, vmin=0, vmax=1, aspect="auto")
    labels = [task["name"] + (" (perplexity)" if task["metric"] == "perplexity" else "") for task in data["tasks"]]
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (r, c), share in np.ndenumerate(shares):
        axes.text(c, r, texts[r][c], ha="center", va="center", fontsize=7.5, color="w" if share > 0.55 else INK)
    return figure


def _multiples(
    panels: Sequence[tuple[str, Any]],
    rows: Sequence[Any],
    columns: Sequence[Any],
    labels: tuple[str, str],
    scale: tuple[float, float, str],
) -> Figure:
    """Heat maps side by side, with one scale: panels are (title, values [rows, columns], nan where there are none)."""
    across = min(ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    figure = _figure(1.0 + 1.75 * across, 0.5 + 1.75 * down)
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat:
        axes.set_visible(False)
    image = None
    for axes, (title, values) in zip(grid.flat, panels, strict=False):
        axes.set_visible(True)
        image = axes.imshow(
            np.array(values, float), cmap=RAMP, vmin=scale[0], vmax=scale[1], aspect="auto", interpolation="nearest"
        )
        axes.set_title(title.replace(" | ", "\n| ").replace("(", "\n(", 1), loc="left", fontsize=7.5)
        axes.tick_params(length=0, labelsize=7)
        axes.spines[:].set_visible(False)
    for at, which, names in ((0, "y", rows), (1, "x", columns)):
        every = max(1, math.ceil(len(names) / 6))
        for axes in grid[:, 0] if which == "y" else grid.flat:
            getattr(axes, f"set_{which}ticks")(range(0, len(names), every), [str(name) for name in names[::every]])
            getattr(axes, f"set_{which}label")(labels[at], fontsize=7.5)
    if image is not None:
        figure.colorbar(image, ax=grid, shrink=0.6, aspect=30, label=scale[2])
    return figure


def _needles(needle: Mapping[str, Any], names: list[str]) -> Figure:
    panels = [(names[p], scores) for p, scores in zip(needle["policies"], needle["scores"], strict=True)]
    return _multiples(
        panels, needle["depths"], needle["lengths"], ("depth", "tokens"), (0, 1, "share of needles found")
    )


def _heads(heads: Mapping[str, Any]) -> Figure:
    panels = [(name, heads[name]) for name in ("sink", "retrieval", "local") if heads.get(name)]
    columns = range(len(panels[0][1][0]))
    return _multiples(panels, heads["layers"], columns, ("layer", "query head"), (0, 1, "share"))


def _budgets(kept: Mapping[str, Any], names: list[str]) -> Figure | None:
    panels = [(names[p], heads) for p, heads in zip(kept["policies"], kept["heads"], strict=True) if heads]
    if not panels:
        return None
    most = max(np.max(heads) for _, heads in panels)
    return _multiples(panels, kept["layers"], range(len(panels[0][1][0])), ("layer", "KV head"), (0, most, "slots"))


def _tokens(kept: Mapping[str, Any], names: list[str]) -> Figure | None:
    rows = [(names[p], share) for p, share in zip(kept["policies"], kept["share"], strict=True) if share]
    if not rows:
        return None
    number = len(kept["tokens"])
    shares = [np.array([int(level, 36) for level in share]) / LEVELS for _, share in rows]
    binned = [[piece.mean() for piece in np.array_split(share, min(BINS, number))] for share in shares]
    figure = _figure(9, 1.0 + 0.24 * len(rows))
    axes = figure.add_subplot()
    image = axes.imshow(
        np.array(binned),
        cmap=RAMP,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(0, number, len(rows) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlabel("tokens of the prompt")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="share of heads", aspect=12)
    return figure


def _drift(drift: Mapping[str, Any], policies: Sequence[Mapping[str, Any]]) -> Figure:
    methods = list(dict.fromkeys(policy["method"] for policy in policies))
    sizes = {m: list(dict.fromkeys(p["budget"] for p in policies if p["method"] == m)) for m in methods}
    kinds = [
        (key, label) for key, label in (("kl", "KL, nats per token"), ("top1", "top-1 agreement")) if drift.get(key)
    ]
    figure = _figure(4.6 * len(kinds) + 2.2, 3.8)
    for axes, (key, label) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for index, curve in zip(drift["policies"], drift[key], strict=True):
            policy = policies[index]
            if index == 0:
                continue
            x = (np.arange(len(curve)) + 0.5) / len(curve) * (drift["tokens"] or len(curve))
            dash = DASHES[sizes[policy["method"]].index(policy["budget"]) % len(DASHES)]
            color = HUES[(methods.index(policy["method"]) - 1) % len(HUES)]
            axes.plot(x, curve, dash, color=color, lw=1.4, label=policy["name"])
        axes.set(xlabel="tokens written", ylabel=label)
        axes.grid(True, color=LINE, lw=0.7)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=7.5)
    return figure
