"""Writes docs/tasks.md, the table of all tasks, from the registry: python scripts/make_task_table.py"""

import dataclasses
from pathlib import Path

from kvjax.evaluation.tasks import TASKS, groups

PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"
HEAD = """# Tasks

Made from the registry by `scripts/make_task_table.py`. A task is named on the command line and in a grid
(`--task vt`, or a group: `ruler`); a file of JSON lines is a task too. In Python:

```python
from kvjax.evaluation.tasks import make_task, make_tasks

task = make_task("niah_multikey_1", context=4096, count=20)
ruler = make_tasks("ruler", context=4096, path="data/")  # All thirteen; path: of SQuAD's and HotpotQA's files.
samples = task.samples(model)  # Token ids of context, question and answers, for this model's tokenizer.
```

Nothing is downloaded. Tasks that are made here fit any tokenizer and length, are never longer than asked, and are the
same for the same seed. Tasks from files read the published format from `path` (the file, or a folder that holds it
under its published name). Of a group, tasks whose file is not in the folder are left out, with a warning.

- **context**: unless a group says otherwise, tokens of the whole, of prompt and answer. A prompt from a file that is
  longer is cut as its benchmark cuts.
- **metric**: `exact` asks whether greedy decoding would write an answer word for word (nothing is written: it is fed),
  `perplexity` is that of the answer's tokens, `drift` is KL and agreement with the full cache along a text of its own.
  For all others up to `tokens` tokens are written greedily. `judge` leaves the text for a judge; any other is the
  function of `kvjax/evaluation/metrics.py` that scores it, from 0 to 1.
- Prompts are those for base models; chat templates are not applied. Where a prompt ends in a space, the space belongs
  to the answer's first token if the tokenizer reads it so.
- *No default* marks what must be given.

## Judges

Some benchmarks let a language model judge what was written. kvjax runs none: it writes answers as the benchmark's own
judge reads them.

```python
import json, pathlib
from kvjax.evaluation import export_predictions

rows = json.loads(pathlib.Path("results.json").read_text())  # Of a run of longmemeval_judged_s.
mine = [row for row in rows if row["policy"] == "snapkv(0.25)"]
export_predictions(mine, "hypotheses.jsonl", "longmemeval")  # For LongMemEval's src/evaluation/evaluate_qa.py.

rows = json.loads(pathlib.Path("other/results.json").read_text())  # Of a run of longgenbench_plans.
mine = [row for row in rows if row["policy"] == "snapkv(0.25)"]
export_predictions(mine, "plans.json", "longgenbench_plans")  # For LongGenBench's Evalution/eval.py.
```
"""
ABOUT = {
    "needle": (
        "Numbers hidden in Python's manual, in the manner of RULER. `context` counts the context alone. With "
        "`depths` a needle lies at each of them: a heat map is a grid of contexts over depths, and rows say "
        "`depth`."
    ),
    "retrieval": (
        "Single retrieval problems with control of depth. Needles and `copy` count the context alone. `passkey` "
        "is [Landmark Attention](https://arxiv.org/abs/2305.16300)'s in the words of InfiniteBench, `kv` is that "
        "of [Lost in the Middle](https://arxiv.org/abs/2307.03172) with its prompt; `copy_tokens` needs no "
        "tokenizer."
    ),
    "text": ("Python's manual as text."),
    "ruler": (
        "[RULER](https://arxiv.org/abs/2404.06654) with its configurations, prompts, answer prefixes, lengths and "
        "scores ([source](https://github.com/NVIDIA/RULER)). What differs: the essay is Python's manual unless "
        "`haystack` names a text file or RULER's PaulGrahamEssays.json (which is not shipped), and words come from a "
        "short list and its compounds in the place of the package wonderwords, so numbers are comparable among "
        "policies here, not with RULER's tables. RULER takes 500 samples. `vt` takes any number of chains and hops. "
        "`kvjax.evaluation.effective_length(rows)` of a policy's rows is the largest length at which the mean over "
        "tasks is 85.6 % at least."
    ),
    "scbench": (
        "[SCBench](https://arxiv.org/abs/2412.10319): several questions about one context that is compressed "
        "once. `mode=multi_turn`: a question follows the earlier ones and their right answers; "
        "`mode=multi_request`: every question comes alone. Rows say `turn`. Four are made here unless `path` "
        "names SCBench's file; the texts of `prefix_suffix` and `many_shot` made here are our own. repoqa and "
        "repoqa_and_kv are missing: their score needs a parser of each language."
    ),
    "longbench": (
        "[LongBench](https://arxiv.org/abs/2308.14508) with its prompts, lengths and metrics "
        "([source](https://github.com/THUDM/LongBench), MIT). Chinese answers are cut into words by the package "
        "jieba (the extra `zh`)."
    ),
    "longbench_e": (
        "LongBench-E: 13 of [LongBench](https://arxiv.org/abs/2308.14508)'s tasks, on texts that are spread evenly "
        "over lengths. Rows say `words`; `kvjax.evaluation.by_words(rows)` of a policy's rows of a task gives the "
        "scores up to 4,000 words, up to 8,000 and above, as the benchmark does."
    ),
    "infinitebench": (
        "[InfiniteBench](https://arxiv.org/abs/2402.13718) with its prompts for base models, lengths and metrics "
        "([source](https://github.com/OpenBMB/InfiniteBench), MIT)."
    ),
    "zeroscrolls": (
        "[ZeroSCROLLS](https://arxiv.org/abs/2305.14196): rows hold their prompts. Answers are published for the "
        "validation split alone. ROUGE is that of SCROLLS: not stemmed, of several references the best for each of "
        "ROUGE-1, 2 and L. Rows hold all three; their `score` is the sample's geometric mean. The published number is "
        'the geometric mean of the three means: `kvjax.evaluation.aggregate("rouge_geometric", rows)` of a policy\'s '
        "rows."
    ),
    "longmemeval": (
        "[LongMemEval](https://arxiv.org/abs/2410.10813). Its judge, a language model, is **not run**: the score "
        "says whether the expected answer stands in what was written. Abstention and preference questions, which "
        "only a judge can score, are left out: `longmemeval_judged` has them. Rows say `question_id`."
    ),
    "longmemeval_judged": (
        "All questions of [LongMemEval](https://arxiv.org/abs/2410.10813), written and **not scored**: "
        '`export_predictions(rows, path, "longmemeval")` writes the file that its own '
        "[judge](https://github.com/xiaowu0162/LongMemEval) reads. The likelihood in a row is that of the reference: "
        "of preferences a rubric, of abstention an explanation."
    ),
    "longgenbench": (
        "[LongGenBench](https://arxiv.org/abs/2410.04199): many answers in one text. Solved examples come from a "
        "file (`examples`); instructions are in our own words. Numbers of questions are those of the "
        "[authors' scripts](https://github.com/Dominic789654/LongGenBench): 35 of GSM8K in each of 20 texts, 20 of "
        "each of MMLU's subjects. Answers that were not written are wrong; there they are left out of GSM8K's count, "
        "and asked for again in MMLU."
    ),
    "longgenbench_plans": (
        "[The other LongGenBench](https://arxiv.org/abs/2409.02076), *Spinning the Golden Thread*. Its judge is "
        "**not run**: the score is the completion rate alone, not whether units hold what they should. "
        '`export_predictions(rows, path, "longgenbench_plans")` writes the file that its '
        "[judge](https://github.com/mozhu621/LongGenBench) reads; rows keep the checks."
    ),
}


def shown(default: object) -> str:
    return "*no default*" if default is dataclasses.MISSING else f"`{default}`"


def row(name: str) -> str:
    entry = TASKS[name]
    parameters = ", ".join(f"{key} {shown(default)}" for key, default in entry.parameters.items())
    return f"| `{name}` | {entry.about} | `{entry.metric}` | {parameters} |\n"


def section(group: str, names: tuple[str, ...]) -> str:
    table = "| task | what it asks | metric | parameters and defaults |\n|---|---|---|---|\n"
    return f"\n## {group}\n\n{ABOUT[group]}\n\n{table}" + "".join(map(row, names))


def page() -> str:
    """All groups, each with its source and a row per task."""
    return HEAD + "".join(section(group, names) for group, names in groups().items())


if __name__ == "__main__":
    PAGE.write_text(page())
