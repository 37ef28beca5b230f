"""Do Locret's retaining heads know what a question will need, before it is asked?

    python experiments/train_locret.py --model tiny --out results/locret_tiny

Heads are trained on needles hidden in the manual that ships with Python: their targets are what the queries of question
and answer look at. A run that was stopped goes on where it was. Then contexts that were not trained on are fed chunk by
chunk, each chunk evicting, and asked for a needle afterwards, beside other policies with as many slots. Writes `heads`
(Orbax; `kvjax.training.locret.load_retaining_heads` reads it), `model`, which is the model with its heads, so that
`kvjax compare --model results/locret_tiny/model --policies "full; locret(0.25, chunk=128, local=16, stabilizers=0.4)"`
works, `trained.safetensors`, which a Hugging Face folder of the same model may hold, `loss.png`, the run (checkpoints,
log) and `table.md`. The heads of the house model are from `--hidden 64 --length 1000 --steps 160`: five minutes on two
CPU cores.

Measured so (docs/measured/locret_tiny.md), a quarter of the slots, needles that are answered:

    locret             75 %
    streaming_llm      21 %
    snapkv             17 %
    random              4 %
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np

import kvjax
from kvjax.checkpoints.orbax import save_params
from kvjax.checkpoints.trained import save_trained
from kvjax.evaluation import Settings, check, make_cases, make_task, resolved_config, run
from kvjax.training import read_log
from kvjax.training.locret import Examples, save_retaining_heads, train_retaining_heads, with_retaining_heads

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def make_examples(model: kvjax.Model, length: int, keys: int, count: int, seed: int) -> list[Examples]:
    """Contexts with so many needles, a question for one and its answer behind each, padded to one length."""
    contexts = -(-count // keys)
    samples = make_task("needle", context=length, count=contexts, needles=keys, seed=seed).samples(model)[:count]
    whole = [(*sample.context_ids, *sample.question_ids, *sample.answers[0]) for sample in samples]
    width = max(map(len, whole))
    return [
        Examples(
            tokens=jnp.asarray([[*ids, *[0] * (width - len(ids))]], jnp.int32),
            prompt=jnp.asarray([len(sample.context_ids)], jnp.int32),
            length=jnp.asarray([len(ids)], jnp.int32),
        )
        for ids, sample in zip(whole, samples, strict=True)
    ]


def plot(folder: Path) -> None:
    log = read_log(folder / "run")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for name, axes in (("fit", left), ("overlap", right)):
        axes.plot([line["step"] for line in log], [line[name] for line in log])
        axes.set(xlabel="step")
    left.set(title="loss: smooth L1 to the largest logit", yscale="log")
    right.set(title="important tenth of the tokens that is found", ylim=(0, 1))
    figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)


def compare(model: kvjax.Model, policies: tuple[kvjax.Policy, ...], args: argparse.Namespace) -> str:
    """A table of answered needles, the question asked after compression."""
    folder = args.out / "needles"
    folder.mkdir(exist_ok=True)
    task = make_task("needle", context=args.length, count=args.needles // args.keys, needles=args.keys)
    settings = Settings(policies=policies, protocol="agnostic", speed=False)
    cases = make_cases(task, task.samples(model), settings)
    check(model, cases, settings)
    config = resolved_config(args.model, model.params["embed"].dtype, task, settings)
    rows = run(model, task, cases, settings, config, folder, [], lambda *_: None)
    lines = []
    for policy in policies:
        mine = [row for row in rows if row["policy"] == str(policy)]
        right, compression, nll = (np.mean([row[name] for row in mine]) for name in ("score", "compression", "nll"))
        lines.append(f"| {policy} | {right:.0%} | {nll:.3f} | {compression:.2f} |")
    return "| policy | needles | NLL | compression |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("results/locret"))
    parser.add_argument("--length", type=int, default=1024, help="tokens of a context")
    parser.add_argument("--keys", type=int, default=4, help="needles of a context")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=float, default=0.2, help="share of the steps")
    parser.add_argument("--budgets", default="0.25,0.125")
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--local", type=int, default=16)
    parser.add_argument("--stabilizers", type=float, default=0.4, help="share of the budget")
    parser.add_argument("--needles", type=int, default=24)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = kvjax.load(args.model)
    examples = make_examples(model, args.length, args.keys, args.steps, seed=1)  # Questions below are of seed 0.
    heads = train_retaining_heads(
        model.params,
        model.config,
        lambda i: examples[i * 7919 % len(examples)],  # Needles lie deeper from one to the next: mixed.
        args.out / "run",
        steps=args.steps,
        hidden=args.hidden,
        rate=args.rate,
        warmup=args.warmup,
    )
    save_retaining_heads(args.out / "heads", heads, overwrite=True)
    plot(args.out)
    model = kvjax.Model(with_retaining_heads(model.params, model.config, heads), model.config, model.tokenizer)
    save_trained(args.out, model.params, model.config)
    save_params(args.out / "model", model.params, model.config, model.tokenizer, overwrite=True)
    policies = [kvjax.policy("full")]
    for budget in map(float, args.budgets.split(",")):
        setting = {"chunk": args.chunk, "local": args.local, "stabilizers": args.stabilizers}
        policies.append(kvjax.policy("locret", budget, **setting))
        policies += [kvjax.policy(name, budget) for name in ("random", "streaming_llm", "snapkv")]
    table = compare(model, tuple(policies), args)
    (args.out / "table.md").write_text(table)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    (args.out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    print(table)


if __name__ == "__main__":
    main()
