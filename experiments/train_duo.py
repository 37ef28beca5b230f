"""Which KV heads of a model retrieve? Trains DuoAttention's gates and shows what they are worth.

    python experiments/train_duo.py --model tiny --out results/duo_tiny

Gates are trained on passkeys hidden in the manual that ships with Python; a run that was stopped goes on where it was.
Then the same number of heads keeps everything: those with the highest gates, those with the lowest, and every other
one; each answers needle questions about compressed contexts. Writes `gates.tsv`, which
`duo_attention("gates.tsv")` reads, `gates.png`, the run (Orbax checkpoints, log) and `table.md`. About ten minutes
for the house model on two CPU cores.

Measured (docs/measured/duo_tiny.md; `--steps 60 --needles 8`), a quarter of the heads keeps everything:

    those with the highest gates       100 % of the needles
    every other                          0 %
    those with the lowest gates          0 %
"""

import argparse
import functools
import json
from pathlib import Path

import matplotlib
import numpy as np

import kvjax
from kvjax.evaluation import Settings, check, make_cases, make_task, resolved_config, run
from kvjax.evaluation.tasks import library_text
from kvjax.training import read_log
from kvjax.training.duo import passkeys, save_gates, train_gates

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def plot(gates: np.ndarray, folder: Path) -> None:
    """The gates by layer and head, and the loss."""
    log = read_log(folder / "run")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    image = left.imshow(gates, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    left.set(xlabel="KV head", ylabel="full-attention layer", title="gate", xticks=range(gates.shape[1]))
    figure.colorbar(image, ax=left)
    for name in ("distill", "gates"):
        right.plot([line["step"] for line in log], [line[name] for line in log], label=name)
    right.set(xlabel="step", yscale="log", title="loss: distillation, and mean gate")
    right.legend()
    figure.savefig(folder / "gates.png", dpi=120)
    plt.close(figure)


def accuracy(model: kvjax.Model, name: str, policies: tuple[kvjax.Policy, ...], args: argparse.Namespace) -> list:
    """Answered needles and compression of every policy, the question asked after compression."""
    folder = args.out / "needles"
    folder.mkdir(exist_ok=True)
    task = make_task("needle", context=args.length, count=args.needles)
    settings = Settings(policies=policies, protocol="agnostic", speed=False)
    cases = make_cases(task, task.samples(model), settings)
    check(model, cases, settings)
    config = resolved_config(name, model.params["embed"].dtype, task, settings)
    rows = run(model, task, cases, settings, config, folder, [], lambda *_: None)
    found = []
    for policy in policies:
        mine = [row for row in rows if row["policy"] == str(policy)]
        found.append((np.mean([row["score"] for row in mine]), np.mean([row["compression"] for row in mine])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("results/duo"))
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt, of a needle's context too")
    parser.add_argument("--least", type=int, default=None, help="of the shortest prompt; default: three quarters")
    parser.add_argument("--keys", type=int, default=4, help="passkeys of a prompt")
    parser.add_argument("--words", type=int, default=8, help="words of a passkey")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--weight", type=float, default=0.05, help="of the penalty on the gates")
    parser.add_argument("--sinks", type=int, default=16)
    parser.add_argument("--recent", type=int, default=64)
    parser.add_argument("--needles", type=int, default=24)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = kvjax.load(args.model)
    if model.tokenizer is None:
        raise SystemExit(f"{args.model} has no tokenizer, and passkeys are text.")
    ring = {"sinks": args.sinks, "recent": args.recent}
    task = passkeys(
        model.tokenizer,
        library_text(),
        length=args.length,
        least=args.least or args.length * 3 // 4,
        keys=args.keys,
        size=args.words,
        batch=args.batch,
    )
    train = functools.partial(train_gates, model.params, model.config, task, args.out / "run", **ring)
    gates = train(steps=args.steps, rate=args.rate, weight=args.weight)
    save_gates(args.out / "gates.tsv", gates)
    plot(gates, args.out)
    print(np.round(gates, 2))

    policies, lines = [kvjax.policy("full")], []
    kinds = {"highest gates": gates.tolist(), "every other": "even", "lowest gates": (1 - gates).tolist()}
    for retrieval in (0.5, 0.25, 0.125):
        for kind, value in kinds.items():
            policy = kvjax.policy("duo_attention", value, retrieval=retrieval, **ring)
            label = f"{kind}, {retrieval:g} of the heads"
            policies.append(kvjax.Policy(stages=policy.stages, label=label))
    for policy, (right, compression) in zip(policies, accuracy(model, args.model, tuple(policies), args), strict=True):
        lines.append(f"| {policy} | {right:.0%} | {compression:.2f} |")
    table = "| keep everything | needles | compression |\n|---|---|---|\n" + "\n".join(lines) + "\n"
    (args.out / "table.md").write_text(table)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    (args.out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    print(table)


if __name__ == "__main__":
    main()
