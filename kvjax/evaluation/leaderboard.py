"""Which policy keeps what, over many tasks: one row per policy, with intervals, and differences that are ones.

Tasks count alike, however many samples they have, and so do lengths and protocols: the score of a policy is the mean
over jobs. It is compared with the full cache's, or another policy's, on the same samples. Models have boards of their
own.
"""

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from kvjax.evaluation.comparison import (
    LEVEL,
    MEASURES,
    Jobs,
    differences,
    jobs_of,
    named,
    score_interval,
)
from kvjax.evaluation.report import megabytes, plain_table, range_text, star
from kvjax.evaluation.results import Row
from kvjax.evaluation.statistics import bootstrap_interval


def leaderboard(rows: Sequence[Row], level: float = LEVEL, against: str | None = None) -> list[Row]:
    """One row per model and policy: model by model, the full cache first and then the best first.

    Args:
      rows: Of all jobs. Policies that could not serve every job are compared on those they served.
      level: Of confidence, for intervals and for all differences together.
      against: The policy that differences are from; default: the full cache. A model that did not run it has none.

    Returns:
      Of each what `standings` says; bootstrap, the percentile bootstrap's interval of the score, for comparison with
      papers (too narrow where contexts are few); and differences, a `Difference` as a mapping for each of `MEASURES`
      that can be compared.

    Raises:
      ValueError: The policy to compare with was not run.
    """
    models = list(dict.fromkeys(row.get("model") for row in rows))
    against = named(against, list(dict.fromkeys(row["policy"] for row in rows))) if against else None
    return [
        row for model in models for row in _compared([row for row in rows if row.get("model") == model], level, against)
    ]


def _compared(rows: Sequence[Row], level: float, against: str | None) -> list[Row]:
    jobs = jobs_of(rows)
    other = against or next(iter(jobs))
    found = {key: differences(jobs, other, measure, level) for key, measure in MEASURES.items() if other in jobs}
    board = standings(rows, level)
    for row in board:
        row["bootstrap"] = score_interval(jobs[row["policy"]], level, bootstrap_interval)
        row["differences"] = {key: vars(of[row["policy"]]) for key, of in found.items() if row["policy"] in of}
    return board


def standings(rows: Sequence[Row], level: float = LEVEL) -> list[Row]:
    """One row per policy, the full cache first and then the best first; policies are not compared.

    Args:
      rows: Of one model.
      level: Of confidence.

    Returns:
      Of each: model and policy; score (mean over jobs of what is scored), low and high (its interval); perplexity
      (geometric mean of jobs that measure it); nll, kl, top1, nbytes, smaller, bytes of full-attention layers,
      decode_tokens_per_s and decode_ratio (means over jobs); jobs. What was not measured is None.
    """
    jobs = jobs_of(rows)
    full = next(iter(jobs.values()))
    board = [_row(name, of, full, level) for name, of in jobs.items()]
    return board[:1] + sorted(board[1:], key=lambda row: (-(row["score"] or 0), row["perplexity"] or 0, row["nll"]))


def _row(name: str, jobs: Jobs, full: Jobs, level: float) -> Row:
    def mean(key: str, only: str = "nll") -> float | None:
        means = [np.mean([row[key] for row in of]) for of in jobs.values() if only in of[0]]
        return float(np.mean(means)) if means else None

    def of_jobs(key: str) -> float | None:
        values = [row[key] for of in jobs.values() for row in of if row.get(key)]
        return float(np.mean(values)) if values else None

    speeds = [_speed_ratio(jobs[key], full[key]) for key in jobs if key in full]
    speeds = [ratio for ratio in speeds if ratio is not None]
    log_perplexity = [np.log([row["perplexity"] for row in of]).mean() for of in jobs.values() if "perplexity" in of[0]]
    first = next(iter(jobs.values()))[0]
    low, high = score_interval(jobs, level) or (None, None)
    return {
        "model": first.get("model"),
        "policy": name,
        "method": first.get("method", name),
        "budget": first.get("budget"),
        "jobs": len(jobs),
        "samples": sum(map(len, jobs.values())),
        "score": mean("score", "score"),
        "low": low,
        "high": high,
        "perplexity": float(np.exp(np.mean(log_perplexity))) if log_perplexity else None,
        **{key: mean(key) for key in ("nll", "kl", "top1", "nbytes", "nbytes_full_layers")},
        "smaller": float(np.mean([_ratio(full[key], jobs[key], "nbytes") for key in jobs if key in full])),
        "decode_tokens_per_s": of_jobs("decode_tokens_per_s"),
        "decode_ratio": float(np.mean(speeds)) if speeds else None,
    }


def _ratio(full: Sequence[Row], mine: Sequence[Row], key: str) -> float:
    return float(np.mean([row[key] for row in full]) / np.mean([row[key] for row in mine]))


def _speed_ratio(mine: Sequence[Row], full: Sequence[Row]) -> float | None:
    """Times are compared within a job, where policies took turns."""
    key = "decode_tokens_per_s"
    if not all(any(row.get(key) for row in of) for of in (mine, full)):
        return None
    speeds = [np.mean([row[key] for row in of if row.get(key)]) for of in (mine, full)]
    return float(speeds[0] / speeds[1])


def leaderboard_table(rows: Sequence[Row], heading: str = "") -> Table:
    """For the terminal, of `leaderboard`'s rows; a star marks what differs from the full cache's, or another's."""
    out = plain_table(heading, "policy")
    perplexity = any(row["perplexity"] for row in rows)
    scored = any(row["score"] is not None for row in rows)
    quality = [*(("score", "95 %") if scored else ()), *(("perplexity",) if perplexity else ())]
    for name in (*quality, "NLL", "KL", "top-1", "cache", "smaller", "decoding"):
        out.add_column(name, justify="right", no_wrap=True)
    several = len({row["model"] for row in rows}) > 1
    for before, row in zip((None, *rows), rows, strict=False):
        if several and (before is None or before["model"] != row["model"]):
            out.add_section()
            out.add_row(f"[bold]{row['model']}[/]")
        cells = [row["policy"]]
        if scored and row["score"] is None:
            cells += ["-", ""]
        elif scored:
            cells += [f"{100 * row['score']:.1f}{star(row, 'score')}", range_text(row, 100, 0)]
        if perplexity:
            cells.append(f"{row['perplexity']:.2f}{star(row, 'perplexity')}" if row["perplexity"] else "-")
        cells += [
            f"{row['nll']:.3f}{star(row, 'nll')}",
            f"{row['kl']:.3f}",
            f"{100 * row['top1']:.0f} %",
            megabytes(row["nbytes"]),
            f"{row['smaller']:.2f}x",
            f"{row['decode_ratio']:.2f}x" if row["decode_ratio"] else "-",
        ]
        out.add_row(*cells)
    return out


def difference_table(rows: Sequence[Row], heading: str = "") -> Table:
    """For the terminal: the differences of `leaderboard`'s rows, with their intervals and p-values."""
    out = plain_table(heading, "policy")
    several = len({row["model"] for row in rows}) > 1
    if several:
        out.add_column("model", no_wrap=True)
    measures = [key for key in MEASURES if any(key in row["differences"] for row in rows)]
    for key in measures:
        for name in (DIFFERENCES[key][0], "95 %", "p"):
            out.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if not row["differences"]:
            continue  # Nothing differs from itself.
        cells = [row["policy"], *([str(row["model"])] if several else [])]
        for key in measures:
            found, (_, scale, places) = row["differences"].get(key), DIFFERENCES[key]
            if found is None:
                cells += ["-", "", ""]
                continue
            mean = f"{scale * found['mean']:+.{places}f}{star(row, key)}"
            cells += [mean, range_text(found, scale, places), f"{found['p']:.4f}"]
        out.add_row(*cells)
    return out


# Heading, scale and decimals of a difference.
DIFFERENCES = {"score": ("score", 100, 1), "nll": ("NLL", 1, 3), "perplexity": ("log perplexity", 1, 3)}
