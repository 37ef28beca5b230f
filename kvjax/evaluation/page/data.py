"""What the page shows, as JSON: the script looks numbers up and draws them, and computes none.

Means, intervals and verdicts are those of `leaderboard`, for every model and every choice of task, length and protocol.
Choices of the same jobs share one table. What is large, differences of any two policies, the text of prompts and who
keeps its tokens, is packed.
"""

import base64
import json
import math
import pathlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, product
from typing import Any

import numpy as np

from kvjax.evaluation.comparison import MEASURES, Difference, difference, jobs_of, named, verdicts
from kvjax.evaluation.leaderboard import standings
from kvjax.evaluation.page.folder import Job, Run
from kvjax.evaluation.results import Row

ANY = "*"  # In the key of a view: all tasks, lengths or protocols.
COLUMNS = (
    "score",
    "low",
    "high",
    "perplexity",
    "nll",
    "kl",
    "top1",
    "nbytes",
    "smaller",
    "decode_tokens_per_s",
    "decode_ratio",
    "jobs",
    "samples",
)
DEPTHS = 11  # So many different depths are shown as they are; more fall into ten bins.
LEVELS = 20  # Shares of heads are told apart by a twentieth.
PACKED = 2_000_000  # Characters of packed prompts that a page holds at most.


def page_data(run: Run, against: str | None = None) -> dict[str, Any]:
    """All of a page.

    Args:
      run: What was read.
      against: The policy that the page first compares with; default: the full cache.

    Returns:
      title and about (what was run), config; models, policies, tasks, lengths and protocols, which everything else
      names by their index; against; columns, keys and boards (the leaderboards, see `views`), and pairs (their
      differences, packed, see `pairs_of`); needles, drift, kept and heads, empty where a run has none.

    Raises:
      ValueError: The policy to compare with was not run.
    """
    rows = run.rows
    policies = _policies(run)
    names = [policy["name"] for policy in policies]
    models = list(dict.fromkeys(row.get("model") for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = sorted({length for row in rows if (length := row.get("length")) is not None})
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    metrics = {row["task"]: row["metric"] for row in rows}
    groups = {row["task"]: row.get("group") for row in rows}
    keys, views_of = views(run, models, tasks, lengths, protocols)
    kept, left_out = _kept(run.jobs, models, names)
    return {
        "title": (run.grid or {}).get("title") or run.name,
        "about": _about(run, tasks, lengths, protocols),
        "config": run.grid or rows[0]["config"],
        "models": [pathlib.PurePath(model or "").name for model in models],
        "policies": policies,
        "against": names.index(named(against, names)) if against else 0,
        "tasks": [{"name": name, "metric": metrics[name], "group": groups[name]} for name in tasks],
        "lengths": lengths,
        "protocols": protocols,
        "columns": COLUMNS,
        "keys": keys,
        "boards": [_board(rows, names) for rows in views_of],
        "pairs": pack([pairs_of(rows, names) for rows in views_of]),
        "needles": _needles(rows, models, names),
        "drift": [curve for job in run.jobs if (curve := _drift(job, models, names))],
        "kept": kept,
        "kept_left_out": left_out,
        "heads": [{"model": models.index(model), **maps} for model, maps in run.heads.items()],
    }


def _policies(run: Run) -> list[Row]:
    """In the grid's order; the full cache is first."""
    found = {row["policy"]: row for row in reversed(run.rows)}
    order = [name for name in (run.grid or {}).get("policies", ()) if name in found]
    names = dict.fromkeys([run.rows[0]["policy"], *order, *(row["policy"] for row in run.rows)])
    return [
        {"name": name, "method": found[name].get("method", name), "budget": _text(found[name].get("budget"))}
        for name in names
    ]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _about(run: Run, tasks: Sequence[str], lengths: Sequence[int], protocols: Sequence[str]) -> Row:
    def all_of(values: Iterable[Any]) -> list[Any]:
        return list(dict.fromkeys(value for value in values if value is not None))

    rows = run.rows
    prompts = [row["prompt_tokens"] for row in rows if "prompt_tokens" in row]
    versions = [row["versions"] for row in rows if row.get("versions")]
    return {
        "models": all_of(pathlib.PurePath(row["model"]).name for row in rows if row.get("model")),
        "dtypes": all_of(row["config"].get("dtype") for row in rows),
        "devices": all_of(row.get("device") for row in rows),
        "versions": {name: all_of(of.get(name) for of in versions) for name in dict.fromkeys(chain(*versions))},
        "tasks": tasks,
        "lengths": lengths,
        "protocols": protocols,
        "prompts": [min(prompts), max(prompts)] if prompts else None,
        "samples": len({(job.name, row["sample"]) for job in run.jobs for row in job.rows}),
        "jobs": len(run.jobs),
        "rows": len(rows),
        "left_out": (run.grid or {}).get("left_out", {}),
        "from": min((row["time"] for row in rows if row.get("time")), default=None),
        "to": max((row["time"] for row in rows if row.get("time")), default=None),
    }


# Leaderboards


def views(
    run: Run, models: Sequence[str | None], tasks: Sequence[str], lengths: Sequence[int], protocols: Sequence[str]
) -> tuple[dict[str, int], list[list[Row]]]:
    """Rows of all choices, of one model each.

    Returns:
      keys: "model/task/length/protocol", each an index or, but for the model, `ANY`, to an index into views; choices
      without rows are not there.
      views: The rows of each.
    """
    keys: dict[str, int] = {}
    found: list[list[Row]] = []
    seen: dict[tuple[int, ...], int] = {}
    firsts = [job.rows[0] for job in run.jobs]
    of = [(row.get("model"), row["task"], row.get("length"), row["protocol"]) for row in firsts]
    choices = ([(ANY, None), *enumerate(values)] for values in (tasks, lengths, protocols))
    for choice in product(enumerate(models), *choices):
        wanted = [(at, value) for at, (index, value) in enumerate(choice) if index != ANY]
        jobs = tuple(i for i, job in enumerate(of) if all(job[at] == value for at, value in wanted))
        if not jobs:
            continue
        if jobs not in seen:
            seen[jobs] = len(found)
            found.append([row for i in jobs for row in run.jobs[i].rows])
        keys["/".join(str(index) for index, _ in choice)] = seen[jobs]
    return keys, found


def _board(rows: Sequence[Row], names: Sequence[str]) -> list[list[Any]]:
    """Lists of [policy's index, *COLUMNS], the full cache first, then the best first."""
    return [[names.index(row["policy"]), *(_short(row[key]) for key in COLUMNS)] for row in standings(rows)]


def pairs_of(rows: Sequence[Row], names: Sequence[str]) -> Row:
    """Differences of any two policies, for each of `MEASURES` that there is.

    Returns:
      policies: Indices of those that are there, in the order of the lists that follow.
      of each measure: pairs, a list for each policy a of [a less b, low, high, p] for every b before it, or None where
      there is nothing to compare; differs, for each policy a "1" for every b that differs from it among all (Holm).
    """
    jobs = jobs_of(rows)
    there = sorted(jobs, key=names.index)
    out: Row = {"policies": [names.index(name) for name in there]}
    for key, measure in MEASURES.items():
        found: dict[tuple[str, str], Difference] = {}
        for i, a in enumerate(there):
            for b in there[:i]:
                if one := difference(jobs[a], jobs[b], measure):
                    found[a, b] = one
        if not found:
            continue
        shown = [
            [[_short(x, 3) for x in (one.mean, one.low, one.high, one.p)] if one else None for one in row]
            for row in ([found.get((a, b)) for b in there[:i]] for i, a in enumerate(there))
        ]
        both = found | {(b, a): one for (a, b), one in found.items()}
        stars = [verdicts({b: both[a, b] for b in there if (a, b) in both}) for a in there]
        marks = ["".join("1" if b in of and of[b].differs else "0" for b in there) for of in stars]
        out[key] = {"pairs": shown, "differs": marks}
    return out


def _short(value: Any, places: int = 5) -> Any:
    """Numbers with the digits that are shown, and nothing that JSON has no word for."""
    if value is None or isinstance(value, bool | np.bool_):
        return None if value is None else bool(value)
    if not math.isfinite(value):
        return None
    number = float(f"{value:.{places}g}")
    return int(number) if number.is_integer() else number


# Needles, drift


def _needles(rows: Sequence[Row], models: Sequence[str | None], names: Sequence[str]) -> list[Row]:
    """For each model, task and protocol with depths: scores [policy][depth][length], None where nothing was asked."""
    deep = [row for row in rows if isinstance(row.get("depth"), int | float) and "score" in row]
    out = []
    for key in dict.fromkeys((row.get("model"), row["task"], row["protocol"]) for row in deep):
        model, task, protocol = key
        mine = [row for row in deep if (row.get("model"), row["task"], row["protocol"]) == key]
        lengths = sorted({row.get("length") or row["prompt_tokens"] for row in mine})
        depths = sorted({round(float(row["depth"]), 3) for row in mine})
        if len(depths) > DEPTHS:
            depths = [round(0.05 + 0.1 * i, 2) for i in range(10)]
        cells: dict[tuple[int, int, int], list[float]] = {}
        for row in mine:
            depth = min(range(len(depths)), key=lambda i: abs(depths[i] - row["depth"]))
            where = names.index(row["policy"]), depth, lengths.index(row.get("length") or row["prompt_tokens"])
            cells.setdefault(where, []).append(row["score"])
        policies = sorted({policy for policy, _, _ in cells})
        scores = [
            [[_mean(cells.get((p, d, s))) for s in range(len(lengths))] for d in range(len(depths))] for p in policies
        ]
        most = max(map(len, cells.values()))
        out.append(
            {"model": models.index(model), "task": task, "protocol": protocol, "lengths": lengths, "depths": depths}
            | {"policies": policies, "scores": scores, "samples": most}
        )
    return out


def _mean(values: Sequence[float] | None) -> float | None:
    return _short(float(np.mean(values))) if values else None


def _drift(job: Job, models: Sequence[str | None], names: Sequence[str]) -> Row | None:
    """KL to the full cache and agreement along a long text, means over samples."""
    rows = [row for row in job.rows if row.get("kl_curve")]
    if not rows:
        return None
    found = list(dict.fromkeys(row["policy"] for row in rows))

    def curves(key: str) -> list[list[float]]:
        grouped = [[row[key] for row in rows if row["policy"] == name] for name in found]
        return [[_short(x) for x in np.mean([c[: min(map(len, of))] for c in of], 0)] for of in grouped]

    agreement = {"top1": curves("top1_curve")} if all(row.get("top1_curve") for row in rows) else {}
    return {
        "model": models.index(rows[0].get("model")),
        "job": job.name,
        "task": rows[0]["task"],
        "length": rows[0].get("length"),
        "protocol": rows[0]["protocol"],
        "tokens": rows[0]["config"].get("task", {}).get("tokens"),
        "samples": len({row["sample"] for row in rows}),
        "policies": [names.index(name) for name in found],
        "kl": curves("kl_curve"),
        **agreement,
    }


# Who stays


def _kept(jobs: Sequence[Job], models: Sequence[str | None], names: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Packed, job by job, as long as there is room; and the names of jobs for which there was none."""
    kept, left_out, room = [], [], PACKED
    for job in jobs:
        if not job.kept or not job.kept.get("policies"):
            continue
        packed = pack(kept_of(job.kept, names))
        if len(packed) > room:
            left_out.append(job.name)
            continue
        room -= len(packed)
        model = models.index(job.rows[0].get("model"))
        kept.append({"model": model, "job": job.name, "sample": job.kept.get("sample"), "packed": packed})
    return kept, left_out


def kept_of(kept: Mapping[str, Any], names: Sequence[str]) -> Row:
    """A job's kept.json for the page: shares as one character per token, in steps of 1 / LEVELS, in base 36."""
    policies = {name: of for name, of in kept["policies"].items() if name in names}
    return {
        "tokens": kept["tokens"],
        "layers": kept["layers"],
        "policies": [names.index(name) for name in policies],
        "heads": [of["heads"] for of in policies.values()],
        "share": [
            "".join(DIGITS[round(LEVELS * share)] for share in of["share"]) if of.get("share") else None
            for of in policies.values()
        ],
    }


DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def pack(value: Any) -> str:
    """JSON, compressed (zlib), in base 64: the browser has all it takes to unpack it."""
    return base64.b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 9)).decode()


def unpack(text: str) -> Any:
    """What `pack` was given."""
    return json.loads(zlib.decompress(base64.b64decode(text)))
