"""LongBench's 21 tasks (arXiv 2308.14508) from its files, with its prompts, lengths and metrics.

The prompt is what the benchmark gives to base models; chat templates are not applied. Data:
https://huggingface.co/datasets/THUDM/LongBench (data.zip holds a file of JSON lines for each task; those that end in
`_e` are LongBench-E).
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


def _prompt(template: str, row: Record) -> Prompt:
    context, question = halves(template, row)
    answers = listed(row["answers"])
    info = {"words": row["length"], "language": row["language"]}
    classes = {"all_classes": list(row["all_classes"])} if row["all_classes"] else {}
    return Prompt(context=context, question=question, answers=answers, references=answers, info=info | classes)


TASKS = {
    f"longbench_{name}": Entry(
        kind=Published,
        group="longbench",
        about=f"{ABOUT[name]} (path of {name}.jsonl)",
        fixed={
            "name": f"longbench_{name}",
            "group": "longbench",
            "metric": task["metric"],
            "files": (f"{name}.jsonl", f"{name}_e.jsonl"),
            "keys": KEYS,
            "make": functools.partial(_prompt, task["prompt"]),
        },
        defaults={"tokens": task["tokens"]},
    )
    for name, task in prompts("longbench").items()
}
