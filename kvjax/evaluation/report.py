"""What came out: a summary per policy, a table for the terminal, and a plot of quality against bytes."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from kvjax.evaluation.comparison import MEASURES, differences, jobs_of, score_interval
from kvjax.evaluation.results import Row
from kvjax.policies import parse_policy, phase


def summarize(rows: Sequence[Row]) -> list[Row]:
    """One row per policy, in the order of the results; the full cache is first.

    Bytes and slots are means over samples, likelihoods are means over tokens. Scores have an interval (low, high), and
    differences are those from the first policy, on the same samples, a mapping of `comparison.Difference` for each of
    `comparison.MEASURES` that there is.
    """
    jobs = jobs_of(rows)
    summaries = [_summary([row for of in mine.values() for row in of]) for mine in jobs.values()]
    first = summaries[0]
    found = {measure.key: differences(jobs, first["policy"], measure) for measure in MEASURES.values()}
    for row, mine in zip(summaries, jobs.values(), strict=True):
        row["differences"] = {key: vars(of[row["policy"]]) for key, of in found.items() if row["policy"] in of}
        if "score" in row:
            row["low"], row["high"] = score_interval(mine) or (None, None)
        row["smaller"] = first["nbytes"] / row["nbytes"]
        speeds = row["decode_tokens_per_s"], first["decode_tokens_per_s"]
        row["decode_ratio"] = speeds[0] / speeds[1] if all(speeds) else None
    return summaries


def _summary(rows: Sequence[Row]) -> Row:
    def mean(key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    tokens = sum(row["answer_tokens"] for row in rows)
    nll = -sum(row["log_likelihood"] for row in rows) / tokens
    speeds = [row["decode_tokens_per_s"] for row in rows if row["decode_tokens_per_s"]]
    quality: Row = {"perplexity": math.exp(nll)}
    if "score" in rows[0]:
        quality = {"score": mean("score")}
    return {
        "policy": rows[0]["policy"],
        "phase": phase(parse_policy(rows[0]["policy"])),
        "samples": len(rows),
        **quality,
        "nll": nll,
        "kl": mean("kl"),
        "top1": mean("top1"),
        "nbytes": mean("nbytes"),
        "nbytes_full_layers": mean("nbytes_full_layers"),
        "compression": mean("compression"),
        "kept": [sum(layer) / len(rows) for layer in zip(*(row["kept"] for row in rows), strict=True)],
        "decode_tokens_per_s": sum(speeds) / len(speeds) if speeds else None,
    }


def title(rows: Sequence[Row]) -> str:
    """Model, task, protocol, context and number of samples."""
    first, config = rows[0], rows[0]["config"]
    model = pathlib.PurePath(first["model"]).name
    lengths = [row["prompt_tokens"] for row in rows]
    low, high = min(lengths), max(lengths)
    prompt = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    asked = "" if first["metric"] == "perplexity" else f"question-{first['protocol']} · "
    number = len({row["sample"] for row in rows})
    return f"{model} ({config['dtype']}) · {first['task']} · {asked}{prompt} tokens compressed · {number} samples"


# Table


def megabytes(nbytes: float) -> str:
    """10^6 bytes, with three digits."""
    number = nbytes / 1e6
    return f"{number:.0f} MB" if number >= 100 else f"{number:.1f} MB" if number >= 1 else f"{nbytes / 1e3:.1f} kB"


def answered(summary: Row) -> str:
    """How many questions were answered, or which part of the references where answers may be right in part."""
    right = summary["score"] * summary["samples"]
    whole = abs(right - round(right)) < 1e-6
    return f"{right:.0f}/{summary['samples']}" if whole else f"{100 * summary['score']:.1f} %"


TEST = "(paired sign-flip test, Holm over all policies, 95 %)"  # What a star stands for.


def range_text(row: Row, scale: float, places: int) -> str:
    """An interval, such as "12 to 34"."""
    if row["low"] is None:
        return "unknown"
    return f"{scale * row['low']:.{places}f} to {scale * row['high']:.{places}f}"


def star(row: Row, measure: str) -> str:
    """A star where a policy differs from what it is compared with, or a space."""
    return "*" if row["differences"].get(measure, {}).get("differs") else " "


def plain_table(heading: str, *names: str) -> Table:
    """Without lines; the first columns are names, which are never folded."""
    title = Text(heading, "bold", no_wrap=True, overflow="ignore")  # As long as it is, over a narrow table too.
    out = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in names:
        out.add_column(name, no_wrap=True)
    return out


def table(summaries: Sequence[Row], heading: str = "") -> Table:
    """For the terminal; a star marks what differs from the first policy's.

    Bytes are those of the whole cache, and of its full-attention layers, which policies act on.
    """
    scored = "score" in summaries[0]
    mixed = any(row["nbytes_full_layers"] != row["nbytes"] for row in summaries)
    out = plain_table(heading, "policy")
    quality_names = ("answered", "95 %") if scored else ("perplexity",)
    for name in (*quality_names, "NLL", "KL", "top-1", "cache", "smaller"):
        out.add_column(name, justify="right", no_wrap=True)
    if mixed:
        out.add_column("full-attn. layers", justify="right", no_wrap=True)
    out.add_column("decoding", justify="right", no_wrap=True)
    best = max(row["score"] for row in summaries) if scored else None
    for row in summaries:
        first = summaries[0]
        quality = answered(row) if scored else f"{row['perplexity']:.2f}"
        quality = f"[bold]{quality}[/]" if scored and row["score"] == best else quality
        cells = [
            row["policy"],
            *((quality + star(row, "score"), range_text(row, 100, 0)) if scored else (quality,)),
            f"{row['nll']:.3f}{star(row, 'nll')}",
            f"{row['kl']:.3f}",
            f"{100 * row['top1']:.0f} %",
            megabytes(row["nbytes"]),
            f"{row['smaller']:.2f}x",
        ]
        if mixed:
            ratio = first["nbytes_full_layers"] / row["nbytes_full_layers"] if row["nbytes_full_layers"] else 1.0
            cells.append(f"{megabytes(row['nbytes_full_layers'])} ({ratio:.1f}x)")
        speed = row["decode_tokens_per_s"]
        cells.append(f"{speed:.1f} tok/s ({row['decode_ratio']:.2f}x)" if speed else "-")
        out.add_row(*cells)
    if any("*" in star(row, key) for row in summaries for key in row["differences"]):
        out.caption_justify = "left"
        out.caption = f"* differs from {summaries[0]['policy']} {TEST}"
    return out


def bench_table(rows: Sequence[Row], heading: str = "") -> Table:
    """Of `speed.bench`; ratios are to the first policy at the same context."""
    out = plain_table(heading)
    out.add_column("context", justify="right")
    out.add_column("policy", no_wrap=True)
    for name in ("prefill", "decoding", "cache"):
        out.add_column(name, justify="right", no_wrap=True)
    context = None
    for row in rows:
        if context is not None and row["context"] != context:
            out.add_section()
        out.add_row(
            f"{row['context']:,}" if row["context"] != context else "",
            row["policy"],
            f"{row['prefill_s']:.2f} s ({row['prefill_ratio']:.2f}x)",
            f"{row['decode_tokens_per_s']:.1f} tok/s ({row['decode_ratio']:.2f}x)",
            f"{megabytes(row['nbytes'])} ({row['nbytes_ratio']:.2f}x)",
        )
        context = row["context"]
    return out


# Plot


@dataclasses.dataclass(frozen=True)
class Panel:
    """One measure of quality.

    Attributes:
      key: In a summary.
      label: Of the axis.
      scale: Factor for the axis.
      more: Whether more is better.
      log: Whether the axis is logarithmic.
    """

    key: str
    label: str
    scale: float = 1.0
    more: bool = False
    log: bool = True


PANELS = {
    "score": (
        Panel("score", "answered, %", 100.0, more=True, log=False),
        Panel("nll", "NLL of the answer, nats per token"),
    ),
    "perplexity": (
        Panel("perplexity", "perplexity of the continuation"),
        Panel("kl", "KL to the full cache, nats per token", log=False),
    ),
}
INK, MUTED, FRONT, POINT = "#1f2933", "#7b8794", "#d9480f", "#1971c2"


def pareto_front(points: Sequence[tuple[float, float]], more: bool) -> list[int]:
    """Indices of the (bytes, quality) points that are better than all with fewer bytes, from few bytes to many."""
    sign = 1.0 if more else -1.0
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1]))
    front, best = [], -math.inf
    for i in order:
        if sign * points[i][1] > best:
            front.append(i)
            best = sign * points[i][1]
    return front


def plot(summaries: Sequence[Row], path: pathlib.Path, heading: str = "") -> None:
    """Writes a PNG: quality against bytes of the whole cache, with the line of policies that no other beats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = PANELS["score" if "score" in summaries[0] else "perplexity"]
    style: Any = {"font.size": 10, "axes.edgecolor": MUTED, "text.color": INK, "axes.labelcolor": INK}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(6.4 * len(panels), 5.2), dpi=150, layout="constrained")
        figure.suptitle(heading, fontsize=12, x=0.01, ha="left")
        for axis, panel in zip(axes, panels, strict=True):
            _draw(axis, panel, summaries)
        figure.canvas.draw()  # Labels find their places once the axes have theirs.
        for axis, panel in zip(axes, panels, strict=True):
            _label_points(axis, panel, summaries)
        figure.savefig(path)
        pyplot.close(figure)


def _points(panel: Panel, summaries: Sequence[Row]) -> list[tuple[float, float]]:
    # A logarithmic axis has no zero: what rounds to it is drawn at the bottom.
    values = [panel.scale * row[panel.key] for row in summaries]
    least = min((value for value in values if value > 0), default=1.0) / 2 if panel.log else -math.inf
    return [(row["nbytes"] / 1e6, max(value, least)) for row, value in zip(summaries, values, strict=True)]


def _draw(axis: Any, panel: Panel, summaries: Sequence[Row]) -> None:
    from matplotlib import ticker

    points = _points(panel, summaries)
    x, y = zip(*points, strict=True)
    front = pareto_front(points, panel.more)
    axis.set_xscale("log")
    if panel.log:
        axis.set_yscale("log")
    axis.step([x[i] for i in front], [y[i] for i in front], where="post", color=FRONT, lw=1.2, alpha=0.7, zorder=2)
    colors = [FRONT if i in front else POINT for i in range(len(points))]
    axis.scatter(x, y, c=colors, s=34, zorder=3, edgecolor="white", linewidth=0.7)
    # Room for labels, and the fixed part of a mixed model's cache, below which no policy of full layers gets.
    fixed = min(row["nbytes"] - row["nbytes_full_layers"] for row in summaries) / 1e6
    low = min(x) if fixed < min(x) / 3 else fixed
    spread = max(max(x) / low, 1.1)
    axis.set_xlim(low / spread**0.12, max(x) * spread**0.3)
    if fixed >= min(x) / 3:
        axis.axvline(fixed, color=MUTED, lw=1, ls=":", zorder=1)
        where, left = axis.get_xaxis_transform(), {"xytext": (-3, 0), "textcoords": "offset points"}
        look = {"color": MUTED, "fontsize": 8, "rotation": 90, "ha": "right", "va": "center"}
        axis.annotate("sliding-window layers alone", (fixed, 0.5), xycoords=where, **left, **look)
    axis.margins(y=0.14)
    if panel.more:
        axis.set_ylim(-9, 109)
    for which, log in ((axis.xaxis, True), (axis.yaxis, panel.log)):
        low, high = which.get_view_interval()
        if log and high / max(low, 1e-30) < 20:  # Decades would leave such an axis bare.
            which.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            which.set_minor_locator(ticker.NullLocator())
            which.set_major_formatter(ticker.FormatStrFormatter("%g"))
        elif log:
            subs = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
            which.set_major_locator(ticker.LogLocator(subs=subs))
            which.set_major_formatter(ticker.FormatStrFormatter("%g"))
            which.set_minor_locator(ticker.NullLocator())
    axis.set_xlabel("cache, MB (better: left)")
    axis.set_ylabel(f"{panel.label} (better: {'up' if panel.more else 'down'})")
    axis.grid(True, color="#e4e7eb", lw=0.7)
    axis.spines[["top", "right"]].set_visible(False)


def _label_points(axis: Any, panel: Panel, summaries: Sequence[Row]) -> None:
    """Puts every policy's name at the nearest free place around its point, with a thin line if that is farther off."""
    points = axis.transData.transform(_points(panel, summaries))
    renderer, frame = axis.figure.canvas.get_renderer(), axis.get_window_extent()
    scale = axis.figure.dpi / 72
    taken = [(px - 5 * scale, py - 5 * scale, px + 5 * scale, py + 5 * scale) for px, py in points]
    taken += _step_boxes([points[i] for i in pareto_front(_points(panel, summaries), panel.more)], scale)
    # Around the point: beside it first, then in ever wider rings.
    places = [(radius * math.cos(angle), radius * math.sin(angle)) for radius in range(9, 140, 9) for angle in ANGLES]
    for row, (px, py) in zip(summaries, points, strict=True):
        name = axis.annotate(row["policy"], (0, 0), xycoords="figure pixels", fontsize=8.5, color=INK)
        box = name.get_window_extent(renderer)
        name.remove()
        width, height = box.width, box.height
        for dx, dy in places:
            x = px + dx * scale - (width if dx < -1 else 0 if dx > 1 else width / 2)
            y = py + dy * scale - height / 2
            label = (x, y, x + width, y + height)
            inside = frame.x0 <= x and x + width <= frame.x1 and frame.y0 <= y and y + height <= frame.y1
            if inside and not any(_overlap(label, other) for other in taken):
                break
        else:
            continue  # No place is free: the table has it all.
        taken.append(label)
        axis.annotate(
            row["policy"],
            xy=(px, py),
            xycoords="figure pixels",
            xytext=(x + width / 2, y + height / 2),
            textcoords="figure pixels",
            ha="center",
            va="center",
            fontsize=8.5,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.6, "shrinkA": 1, "shrinkB": 3}
            if math.hypot(dx, dy) > 12
            else None,
        )


def _step_boxes(front: Sequence[Any], margin: float) -> list[tuple[float, ...]]:
    """The Pareto line's pieces as boxes, in pixels: to the right from each point, then up or down to the next."""
    boxes = []
    for (x, y), (next_x, next_y) in zip(front, front[1:], strict=False):
        boxes.append((x, y - margin, next_x, y + margin))
        boxes.append((next_x - margin, min(y, next_y), next_x + margin, max(y, next_y)))
    return boxes


ANGLES = [math.radians(degrees) for degrees in (0, 30, -30, 180, 150, -150, 60, -60, 90, -90, 120, -120)]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
