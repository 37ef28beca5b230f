"""Does decoding scale? What a device stores and sends, from 8 to 256 chips at the same number of tokens per chip.

    python experiments/weak_scaling.py --out docs/measured/weak_scaling --images docs/images

Llama 3.1 8B in bfloat16, four sequences, heads over 8 chips and slots over the others, so that the context grows with
the chips: 32,768 tokens on 8, a million on 256. Every decode step is compiled for its topology of v5e with libtpu; no
TPU is needed (about five minutes on two CPU cores). Writes `results.json` (a plan per topology), `table.md` and
`weak_scaling.svg`; one that was stopped goes on where it was.

Compiled (docs/measured/weak_scaling/table.md), from 8 to 256 chips; of a device:

    full                               cache 2.17 GB                 sends 3.73 to 4.25 MB a step
    snapkv(0.1) | kivi(bits=2)         cache 51.1 to 52.6 MB         sends 3.73 to 6.40 MB a step
"""

import argparse
import json
from pathlib import Path
from typing import Any

from kvjax.commands.common import write_whole
from kvjax.sharding.plan import answer, as_dict, ask, parse_topology
from kvjax.sharding.plan.report import duration, size

TOPOLOGIES = ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
MODEL, BATCH, HEADS, TOKENS = "llama3.1-8b", 4, 8, 4096  # Tokens of each sequence per chip.
POLICIES = ("full", "snapkv(0.1) | kivi(bits=2)")


def planned(policy: str, shape: str) -> dict[str, Any]:
    topology = f"v5e:{shape}"
    devices = parse_topology(topology).devices
    question, place = ask(MODEL, policy, TOKENS * devices, BATCH, topology, f"seq={devices // HEADS},model={HEADS}")
    found = as_dict(answer(question, place))
    print(policy, topology, size(found["memory"]["total"]), flush=True)
    return found


def plans(partial: Path) -> dict[str, list[dict[str, Any]]]:
    """Of every policy one for every topology; `partial` keeps those that are done until all are."""
    results = json.loads(partial.read_text()) if partial.is_file() else {policy: [] for policy in POLICIES}
    for policy, found in results.items():
        for shape in TOPOLOGIES[len(found) :]:
            found.append(planned(policy, shape))
            write_whole(partial, json.dumps(results))
    return results


def sent(found: dict[str, Any]) -> float:
    return sum(one["sent"] for one in found["collectives"])


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row per policy and topology."""
    head = "| policy | chips | context | parameters | cache | temporaries | collectives | sent | step, at least |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for policy, found in results.items():
        for one in found:
            memory, count = one["memory"], sum(c["count"] for c in one["collectives"])
            cells = [policy.replace("|", "\\|"), one["devices"], f"{one['context']:,}"]
            cells += [size(memory[name]) for name in ("params", "cache", "temporaries")]
            cells += [f"{count:,}", size(sent(one)), duration(one["decode"]["least_seconds"])]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for policy, found in results.items():
        chips = [one["devices"] for one in found]
        left.plot(chips, [one["memory"]["cache"] / 1e9 for one in found], marker="o", label=policy)
        right.plot(chips, [sent(one) / 1e6 for one in found], marker="o", label=policy)
    left.set(title="cache of a device", ylabel="GB")
    right.set(title="sent by a device per decode step", ylabel="MB")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="v5e chips (4 x 4,096 tokens per chip)", ylim=(0, None))
        axis.set_xticks(chips, [str(n) for n in chips])
        axis.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a device stores and sends, from 8 to 256 chips.")
    parser.add_argument("--out", type=Path, default=Path("results/weak_scaling"), help="Folder of the numbers.")
    parser.add_argument("--images", type=Path, help="Folder of the picture. Default: the same.")
    args = parser.parse_args()
    images = args.images or args.out
    for folder in (args.out, images):
        folder.mkdir(parents=True, exist_ok=True)
    partial = args.out / "unfinished.json"
    results = plans(partial)
    write_whole(args.out / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(args.out / "table.md", table(results))
    plot(results, images / "weak_scaling.svg")
    partial.unlink(missing_ok=True)
    print(table(results))


if __name__ == "__main__":
    main()
