"""InfiniteBench's twelve tasks (arXiv 2402.13718) from its files, with its prompts, lengths and metrics.

Prompts are those for base models (`yarn_mistral_templates`). Data:
https://huggingface.co/datasets/xinrongzhang2022/InfiniteBench.
"""

import functools
import re

from kvjax.evaluation.tasks.base import Entry
from kvjax.evaluation.tasks.fit import Prompt
from kvjax.evaluation.tasks.published import Published, Record, halves, listed, prompts

LETTERS = "ABCD"
CHOICES = ("code_debug", "longbook_choice_eng")
ABOUT = {
    "passkey": "finds a pass key in noise",
    "number_string": "finds a number of ten digits in noise",
    "kv_retrieval": "finds the value of a key in a JSON object",
    "longbook_sum_eng": "summarizes a book",
    "longbook_choice_eng": "answers a choice about a book",
    "longbook_qa_eng": "answers a question about a book",
    "longbook_qa_chn": "answers a question about a Chinese book",
    "longdialogue_qa_eng": "says whose name is masked in a script",
    "math_find": "finds the largest, smallest ... number of a list",
    "math_calc": "calculates a long sum step by step",
    "code_run": "says what a function returns",
    "code_debug": "names the function with an error",
}


def _prompt(name: str, template: str, row: Record) -> Prompt:
    context, question = halves(template, _fields(name, row))
    answers, references = _answers(name, row)
    return Prompt(context=context, question=question, answers=answers, references=references)


def _fields(name: str, row: Record) -> dict[str, str]:
    fields = {"context": row["context"], "input": row["input"], "question": row["input"]}
    if name in CHOICES:
        fields |= {f"OPTION_{letter}": option for letter, option in zip(LETTERS, row["options"], strict=True)}
    if name == "code_run":
        call = re.findall(r"func_[0-9]+\(-?[0-9]+\)", row["input"])[0]
        fields |= {"func": call.split("(")[0], "func_call": call}
    if name == "math_find":
        target = re.findall(r"The .+ of", row["input"])[0].lower()[:-3]
        fields["prefix"] = f"What is {target} in the following list?"
    return fields


def _answers(name: str, row: Record) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """As a model would write them, and what the metric wants to know."""
    given = row["answer"]
    if name == "math_calc":
        numbers = listed(given[0] if isinstance(given[0], list) else given)
        return (f"[{', '.join(numbers)}]",), numbers
    given = listed(given)
    if name in CHOICES:
        letter = LETTERS[row["options"].index(given[0])]
        # Code.Debug's metric wants a point after the letter.
        written = (f"{letter}. {given[0]}",) if name == "code_debug" else (letter, given[0])
        return written, (given[0], letter)
    return given, given


TASKS = {
    f"infinitebench_{name}": Entry(
        kind=Published,
        group="infinitebench",
        about=f"{ABOUT[name]} (path of {name}.jsonl)",
        fixed={
            "name": f"infinitebench_{name}",
            "group": "infinitebench",
            "metric": task["metric"],
            "files": (f"{name}.jsonl",),
            "keys": ("context", "input", "answer"),
            "make": functools.partial(_prompt, name, task["prompt"]),
        },
        defaults={"tokens": task["tokens"]},
    )
    for name, task in prompts("infinitebench").items()
}
