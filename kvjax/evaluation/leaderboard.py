"""Which policy keeps what, over many tasks: one row per policy, with intervals, and differences that are ones.

Tasks count alike, however many samples they have, and so do lengths and protocols: the score of a policy is the mean
over jobs. It is compared with the full cache's on the same samples; contexts are drawn again as a whole.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from kvjax.evaluation.report import megabytes
from kvjax.evaluation.results import Row
from kvjax.evaluation.statistics import differs, macro, sign_flip

LEVEL = 0.95


def leaderboard(rows: Sequence[Row], level: float = LEVEL) -> list[Row]:
    """One row per policy, the full cache first and then the best first.

    Args:
      rows: Of all jobs. Policies that could not serve every job are compared on those they served.
      level: Of confidence, for intervals and for all differences together.

    Returns:
      Of each policy: score (mean over jobs of what is scored), low and high (its interval; infinite where it is
      unknown), difference (to the full cache on the same samples), p, and differs (Holm over all policies); perplexity
      (geometric mean of jobs that measure it); nll, kl, top1, nbytes, smaller, bytes of full-attention layers,
      decode_tokens_per_s and decode_ratio (means over jobs); jobs. What was not measured is None.
    """
    names = list(dict.fromkeys(row["policy"] for row in rows))
    jobs = {name: _jobs([row for row in rows if row["policy"] == name]) for name in names}
    full = jobs[names[0]]
    found = [_row(name, jobs[name], full, level) for name in names]
    tested = [row for row in found[1:] if row["p"] is not None]
    for row, verdict in zip(tested, differs([row["p"] for row in tested], level), strict=True):
        row["differs"] = verdict
    return found[:1] + sorted(found[1:], key=lambda row: (-(row["score"] or 0), row["perplexity"] or 0, row["nll"]))


def job_of(row: Row) -> tuple[Hashable, ...]:
    """What a row belongs to: task, length and protocol."""
    return row["task"], row.get("length"), row["protocol"]


def cluster_of(row: Row) -> Hashable:
    """Samples with one context stand and fall together."""
    return row.get("context", row["sample"])


def _jobs(rows: Sequence[Row]) -> dict[tuple[Hashable, ...], list[Row]]:
    keys = list(dict.fromkeys(map(job_of, rows)))
    return {key: [row for row in rows if job_of(row) == key] for key in keys}


def _row(name: str, jobs: dict[Any, list[Row]], full: dict[Any, list[Row]], level: float) -> Row:
    def mean(key: str, only: str = "nll") -> float | None:
        means = [np.mean([row[key] for row in of]) for of in jobs.values() if only in of[0]]
        return float(np.mean(means)) if means else None

    def of_jobs(key: str) -> float | None:
        values = [row[key] for of in jobs.values() for row in of if row.get(key)]
        return float(np.mean(values)) if values else None

    scored = [key for key, of in jobs.items() if "score" in of[0]]
    speeds = [_speed_ratio(jobs[key], full[key]) for key in jobs if key in full]
    speeds = [ratio for ratio in speeds if ratio is not None]
    log_perplexity = [np.log([row["perplexity"] for row in of]).mean() for of in jobs.values() if "perplexity" in of[0]]
    first = next(iter(jobs.values()))[0]
    out: Row = {
        "policy": name,
        "method": first.get("method", name),
        "budget": first.get("budget"),
        "jobs": len(jobs),
        "samples": sum(map(len, jobs.values())),
        "score": mean("score", "score"),
        "low": None,
        "high": None,
        "difference": None,
        "p": None,
        "differs": False,
        "perplexity": float(np.exp(np.mean(log_perplexity))) if log_perplexity else None,
        **{key: mean(key) for key in ("nll", "kl", "top1", "nbytes", "nbytes_full_layers")},
        "smaller": float(np.mean([_ratio(full[key], jobs[key], "nbytes") for key in jobs if key in full])),
        "decode_tokens_per_s": of_jobs("decode_tokens_per_s"),
        "decode_ratio": float(np.mean(speeds)) if speeds else None,
    }
    if scored:
        clusters = [[cluster_of(row) for row in jobs[key]] for key in scored]
        out["low"], out["high"] = macro([[row["score"] for row in jobs[key]] for key in scored], clusters, level=level)
    if scored and jobs is not full:
        out["difference"], out["p"] = _difference([jobs[key] for key in scored], [full[key] for key in scored])
    return out


def _difference(mine: Sequence[Sequence[Row]], full: Sequence[Sequence[Row]]) -> tuple[float, float]:
    """Mean difference of jobs and its p-value: every context's share in it changes its sign or not."""
    shares: list[float] = []
    for rows, others in zip(mine, full, strict=True):
        of_full = {row["sample"]: row["score"] for row in others}
        totals: dict[Hashable, float] = {}
        for row in rows:
            key = cluster_of(row)
            totals[key] = totals.get(key, 0.0) + row["score"] - of_full[row["sample"]]
        shares += [total / len(rows) / len(mine) for total in totals.values()]
    return float(np.sum(shares)), sign_flip(shares)


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
    """For the terminal, of `leaderboard`'s rows; a star marks a score that differs from the full cache's."""
    out = Table(title=heading, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    out.add_column("policy", no_wrap=True)
    perplexity = any(row["perplexity"] for row in rows)
    quality = ["score", "95 %"] if any(row["score"] is not None for row in rows) else []
    for name in (
        *quality,
        *(["perplexity"] if perplexity else []),
        "NLL",
        "KL",
        "top-1",
        "cache",
        "smaller",
        "decoding",
    ):
        out.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["policy"]]
        if quality and row["score"] is None:
            cells += ["-", ""]
        elif quality:
            cells += [
                f"{100 * row['score']:.1f}{'*' if row['differs'] else ' '}",
                f"{100 * row['low']:.0f} to {100 * row['high']:.0f}" if math.isfinite(row["low"]) else "unknown",
            ]
        if perplexity:
            cells.append(f"{row['perplexity']:.2f}" if row["perplexity"] else "-")
        cells += [
            f"{row['nll']:.3f}",
            f"{row['kl']:.3f}",
            f"{100 * row['top1']:.0f} %",
            megabytes(row["nbytes"]),
            f"{row['smaller']:.2f}x",
            f"{row['decode_ratio']:.2f}x" if row["decode_ratio"] else "-",
        ]
        out.add_row(*cells)
    return out
