"""Which policy keeps a needle, at which budget, and does it matter whether the question is known before compression?

    python experiments/needles_by_budget.py --out results/needles_by_budget

Twelve recorded prompts of 2,000 tokens with one number to find (`tests/data/needles_gemma3_270m.json`), Gemma 3 270M,
every eviction rule at a half, a quarter and a tenth of the full-attention layers' cache, both protocols. One prefill
feeds all policies; an interrupted run goes on where it stopped. Writes `results.json` and `pareto.png` per protocol,
and one table. About ten minutes on two CPU cores.

Measured (docs/measured/needles_by_budget.md), answered of 12 at a quarter, the question known and not:

    full        12  12      keydiff         7   6      tova, knorm              1   0
    chunkkv     12   7      all the others  0   0
"""

import argparse
import json
from pathlib import Path

import kvjax
from kvjax.evaluation import (
    Settings,
    check,
    make_cases,
    make_folder,
    make_task,
    parse_policies,
    plot,
    read_rows,
    resolved_config,
    run,
    summarize,
)

MODEL = "gemma3-270m"
BUDGETS = (0.5, 0.25, 0.1)
RULES = {
    "chunkkv": "chunkkv({})",
    "keydiff": "keydiff({})",
    "knorm": "knorm({})",
    "tova": 'tova({}, phase="prompt")',
    "snapkv": "snapkv({})",
    "pyramidkv": "pyramidkv({})",
    "h2o": 'h2o({}, phase="prompt")',
    "expected_attention": "expected_attention({})",
    "streaming_llm": "streaming_llm({})",
    "random": "random({})",
}
DATA = Path(__file__).parents[1] / "tests" / "data" / "needles_gemma3_270m.json"


def prompts(folder: Path) -> Path:
    """The recorded prompts as a file that `make_task` reads."""
    samples = json.loads(DATA.read_text())["niah"]
    keys = ("context_ids", "question_ids", "answer_ids")
    path = folder / "needles.jsonl"
    path.write_text("".join(json.dumps({key: sample[key] for key in keys}) + "\n" for sample in samples))
    return path


def table(answered: dict[str, dict[str, int]], number: int) -> str:
    """Rows are rules, columns protocols and budgets; answered out of `number`."""
    columns = [(protocol, budget) for protocol in answered for budget in BUDGETS]
    head = "| rule | " + " | ".join(f"{protocol}, {budget:g}" for protocol, budget in columns) + " |\n"
    lines = [head, "|---" * (len(columns) + 1) + "|\n"]
    for name, rule in RULES.items():
        counts = [answered[protocol][rule.format(budget)] for protocol, budget in columns]
        lines.append(f"| {name} | " + " | ".join(map(str, counts)) + " |\n")
    full = ", ".join(f"{protocol} {counts['full']}" for protocol, counts in answered.items())
    return "".join(lines) + f"\nAnswered out of {number}; the full cache: {full}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/needles_by_budget"))
    parser.add_argument("--samples", type=int, default=None, help="prompts; default: all twelve")
    args = parser.parse_args()
    make_folder(args.out)
    texts = ["full", *(rule.format(budget) for rule in RULES.values() for budget in BUDGETS)]
    policies = parse_policies("; ".join(texts))
    task = make_task(str(prompts(args.out)), count=args.samples)
    model = kvjax.load(MODEL)
    answered, number = {}, 0
    for protocol in ("aware", "agnostic"):
        settings, folder = Settings(policies=policies, protocol=protocol, speed=False), args.out / protocol
        make_folder(folder)
        config = resolved_config(MODEL, model.params["embed"].dtype, task, settings)
        cases = make_cases(task, task.samples(model), settings)
        check(model, cases, settings)
        rows = run(
            model,
            task,
            cases,
            settings,
            config,
            folder,
            read_rows(folder, config, overwrite=False),
            lambda done, total, what, protocol=protocol: print(f"\r{protocol} {done}/{total} {what:40}", end=""),
        )
        plot(summarize(rows), folder / "pareto.png", f"Needles, question-{protocol}")
        label = {text: str(kvjax.parse_policy(text)) for text in texts}
        right = {name: [row["score"] for row in rows if row["policy"] == name] for name in label.values()}
        answered[protocol] = {text: round(sum(right[label[text]])) for text in texts}
        number = len(cases)
    text = table(answered, number)
    (args.out / "table.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
