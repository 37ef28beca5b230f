"""LongBench's 21 tasks (arXiv 2308.14508) from its files, with its prompts, lengths and metrics; and LongBench-E's 13.

The prompt is what the benchmark gives to base models; chat templates are not applied. Data:
https://huggingface.co/datasets/THUDM/LongBench (data.zip holds a file of JSON lines for each task; those that end in
`_e` are LongBench-E, whose texts are spread evenly over lengths: `metrics.by_words`).
"""

import functools

from kvjax.evaluation.tasks.base import Entry
from kvjax.evaluation.tasks.fit import Prompt
from kvjax.evaluation.tasks.published import Published, Record, halves, listed, prompts

KEYS = ("input", "context", "answers", "all_classes", "length", "language")
ABOUT = {
    "narrativeqa": "answers a question about a story",
    "qasper": "answers a question about a scientific article",
    "multifieldqa_en": "answers a question about a text",
    "multifieldqa_zh": "answers a question about a Chinese text",
    "hotpotqa": "answers a question that takes two passages",
    "2wikimqa": "answers a question that takes several passages",
    "musique": "answers a question that takes up to four passages",
    "dureader": "answers a Chinese question about web pages",
    "gov_report": "summarizes a report",
    "qmsum": "answers a query about a meeting",
    "multi_news": "summarizes several news texts",
    "vcsum": "summarizes a Chinese meeting",
    "trec": "classifies a question after many examples",
    "triviaqa": "answers a question after examples",
    "samsum": "summarizes a dialogue after examples",
    "lsht": "classifies Chinese news after examples",
    "passage_count": "counts different paragraphs",
    "passage_retrieval_en": "names the paragraph that an abstract is of",
    "passage_retrieval_zh": "names the paragraph that a Chinese abstract is of",
    "lcc": "writes the next line of code",
    "repobench-p": "writes the next line of code of a repository",
}
EVEN = (  # LongBench-E's, see LongBench/pred.py.
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "gov_report",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
)


def _prompt(template: str, row: Record) -> Prompt:
    context, question = halves(template, row)
    answers = listed(row["answers"])
    info = {"words": row["length"], "language": row["language"]}
    classes = {"all_classes": list(row["all_classes"])} if row["all_classes"] else {}
    return Prompt(context=context, question=question, answers=answers, references=answers, info=info | classes)


def _entry(group: str, name: str, file: str) -> Entry:
    task = prompts("longbench")[name]
    return Entry(
        kind=Published,
        group=group,
        about=f"{ABOUT[name]} (path of {file})",
        fixed={
            "name": f"{group}_{name}",
            "group": group,
            "metric": task["metric"],
            "files": (file,),
            "keys": KEYS,
            "make": functools.partial(_prompt, task["prompt"]),
        },
        defaults={"tokens": task["tokens"]},
    )


TASKS = {
    **{f"longbench_{name}": _entry("longbench", name, f"{name}.jsonl") for name in prompts("longbench")},
    **{f"longbench_e_{name}": _entry("longbench_e", name, f"{name}_e.jsonl") for name in EVEN},
}
