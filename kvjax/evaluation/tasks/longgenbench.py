"""Two benchmarks of that name: many answers in one long text (arXiv 2410.04199), and long plans (arXiv 2409.02076).

Neither has published its prompts under a licence. The first one's instructions are in words of our own, its solved
examples come from a file of yours; the second one's prompts are its data.
"""

import csv
import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from kvjax.evaluation.tasks.base import (
    Entry,
    Metric,
    MissingFile,
    Sample,
    check_number,
    digest,
    text_sample,
    tokenizer_of,
)
from kvjax.evaluation.tasks.fit import Prompt
from kvjax.evaluation.tasks.published import Published, Record, locate, records
from kvjax.model import Model

LETTERS = "ABCD"
CHECKS = ("checks_once", "checks_range", "checks_periodic")
INSTRUCTION = (
    "Solve every question step by step, in the form of the examples: an answer begins with 'Answer_' and its number "
    "and ends with 'The answer is'. Do not write questions again. Answer all questions, however many there are.\n\n"
)
SUBJECT = "All are multiple choice questions about {subject}.\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyAnswers:
    """K questions, all of which are to be answered in one text; the share that is right is scored.

    An answer counts in the place where it stands, and by its last number or letter, as in the benchmark
    (https://github.com/Dominic789654/LongGenBench). Answers that were not written are wrong. There they are left out of
    the count of GSM8K; of MMLU they are asked for again, as often as it takes, and of the answers only those to the
    last request count. Where an answer holds no number or letter, the benchmark reads one from a label in its log (its
    place, or "A"); here it is wrong.

    Attributes:
      name: Of the task.
      data: "gsm8k" (JSON lines of question and answer) or "mmlu" (a folder of SUBJECT_test.csv).
      metric: "numbered_numbers" or "numbered_letters".
      path: Of GSM8K's test.jsonl or its folder; of MMLU's folder that holds the files, or `test` with them.
      examples: Solved examples: for GSM8K a text of "Question_1:" ... "Answer_8:", for MMLU a JSON object of texts with
        "Q:" and "A:" by subject (the benchmark's LongGenBench_prompt.txt and .json).
      questions: K: the authors' scripts take 35 of GSM8K and 20 of MMLU, and so do the tasks.
      count: Number of texts; default: 20 of GSM8K, whose first 700 questions the authors ask, and one for each of
        MMLU's subjects.
      tokens: Written at most.
    """

    name: str
    data: Literal["gsm8k", "mmlu"]
    metric: Metric
    path: str
    examples: str
    questions: int
    count: int | None = None
    tokens: int = 4096
    group: str = dataclasses.field(default="longgenbench", init=False)
    length: int | None = dataclasses.field(default=None, init=False)

    def __post_init__(self):
        check_number("questions", self.questions, 1)
        check_number("tokens", self.tokens, 1)
        if self.count is not None:
            check_number("samples", self.count, 1)
        self._prompts()

    def resolved(self) -> dict[str, Any]:
        content = json.dumps([dataclasses.asdict(prompt) for prompt in self._prompts()])
        return dataclasses.asdict(self) | {
            "path": pathlib.Path(self.path).name,
            "examples": pathlib.Path(self.examples).name,
            "sha256": digest(content),
        }

    def samples(self, model: Model) -> list[Sample]:
        tokenizer = tokenizer_of(model, self.name)
        return [
            text_sample(
                tokenizer,
                id=str(i),
                context=prompt.context,
                question=prompt.question,
                answers=prompt.answers,
                references=prompt.references,
                max_new_tokens=self.tokens,
                info=prompt.info,
            )
            for i, prompt in enumerate(self._prompts())
        ]

    def _prompts(self) -> list[Prompt]:
        return _gsm8k(self) if self.data == "gsm8k" else _mmlu(self)


def _gsm8k(task: ManyAnswers) -> list[Prompt]:
    rows = records(locate(task.path, ("test.jsonl",)), ("question", "answer"))
    examples = _text(task.examples)
    first = examples.count("Question_") + 1
    groups = [rows[i : i + task.questions] for i in range(0, len(rows), task.questions)]
    return [
        _prompt(
            INSTRUCTION + "Examples: \n" + examples + "\n\nFollowing Question: \n",
            [f"Question_{i}:\n{row['question']}\n" for i, row in enumerate(group, first)],
            [str(row["answer"]) for row in group],
            first,
            {},
        )
        for group in groups[: task.count]
    ]


def _mmlu(task: ManyAnswers) -> list[Prompt]:
    folder = pathlib.Path(task.path)
    folder = folder / "test" if (folder / "test").is_dir() else folder
    files = sorted(folder.glob("*_test.csv"))
    if not files:
        raise MissingFile(f"There is no SUBJECT_test.csv at {task.path}: give the folder of MMLU's data.")
    try:
        solved = json.loads(_text(task.examples))
    except ValueError as error:
        raise ValueError(f"{task.examples} is no JSON object of texts by subject: {error}") from None
    return [_of_subject(file, solved, task) for file in files[: task.count]]


def _of_subject(file: pathlib.Path, solved: Record, task: ManyAnswers) -> Prompt:
    subject = file.name.removesuffix("_test.csv")
    if subject not in solved:
        raise ValueError(f"{task.examples} has no examples for {subject}.")
    with file.open(encoding="utf-8", newline="") as opened:
        rows = [row for row in csv.reader(opened) if row][: task.questions]
    if not rows or any(len(row) != 6 or row[-1] not in LETTERS for row in rows):
        raise ValueError(f"{file}: rows are question, four options and a letter, without a heading.")
    pairs = [part.split("\nA: ", 1) for part in solved[subject].split("\n\nQ: ")[1:]]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f'{task.examples}: examples for {subject} are not of the form "Q: ...", "A: ...".')
    examples = "".join(f"Question_{i}:\n{question}\n\n" for i, (question, _) in enumerate(pairs, 1))
    examples += "".join(f"Answer_{i}:\n{answer}\n\n" for i, (_, answer) in enumerate(pairs, 1))
    first = len(pairs) + 1
    options = [
        "".join(f"({letter}) {option}" for letter, option in zip(LETTERS, row[1:5], strict=True)) for row in rows
    ]
    return _prompt(
        INSTRUCTION
        + SUBJECT.format(subject=subject.replace("_", " "))
        + "Examples: \n"
        + examples
        + "Following Question: \n",
        [
            f"Question_{i}:\n{row[0]}\n{text}\n\n"
            for i, (row, text) in enumerate(zip(rows, options, strict=True), first)
        ],
        [f"The answer is ({row[-1]})." for row in rows],
        first,
        {"subject": subject},
    )


def _prompt(context: str, questions: Sequence[str], answers: Sequence[str], first: int, info: dict[str, Any]) -> Prompt:
    gold = "\n\n".join(f"Answer_{i}:\n{answer}" for i, answer in enumerate(answers, first))
    return Prompt(
        context=context,
        question="".join(questions) + "\n",
        answers=(gold,),
        references=tuple(answers),
        info=info | {"questions": len(questions)},
    )


@functools.cache
def _text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read the examples {path}: {error}.") from None


# Long plans


def _plan(row: Record) -> Prompt:
    """A prompt that ends with the heading of the first unit, such as a week of a diary."""
    unit, heading = row["type"], row["prefix"]
    context, _, question = row["prompt"].rpartition("\n")
    return Prompt(
        context=context,
        question="\n" + question,
        answers=(f"\n#*# {unit} 2",),
        # What units should hold is for the benchmark's own judge: see `export_predictions`.
        info={"unit": unit, "units": int(row["number"]), "heading": heading, **{key: row[key] for key in CHECKS}},
    )


TASKS = {
    "longgenbench_gsm8k": Entry(
        kind=ManyAnswers,
        group="longgenbench",
        about="answers many questions of GSM8K in one text (path of test.jsonl, examples: path of solved ones)",
        fixed={"name": "longgenbench_gsm8k", "data": "gsm8k", "metric": "numbered_numbers"},
        defaults={"questions": 35, "count": 20},
    ),
    "longgenbench_mmlu": Entry(
        kind=ManyAnswers,
        group="longgenbench",
        about="answers many questions of MMLU in one text (path of its folder, examples: path of solved ones)",
        fixed={"name": "longgenbench_mmlu", "data": "mmlu", "metric": "numbered_letters"},
        defaults={"questions": 20},
    ),
    # Its judge, a language model, is not run here: whether units hold what they should is not known. There is no
    # reference text either, so likelihood is that of the second unit's heading.
    "longgenbench_plans": Entry(
        kind=Published,
        group="longgenbench_plans",
        about="writes a plan of many units, of which those that were written count (path of Dataset_short.json)",
        fixed={
            "name": "longgenbench_plans",
            "group": "longgenbench_plans",
            "metric": "completion_rate",
            "files": ("Dataset_short.json", "Dataset_long.json"),
            "keys": ("prompt", "type", "prefix", "number", *CHECKS),
            "make": _plan,
            "stop": ("*** finished",),
        },
        defaults={"tokens": 8000},
    ),
}
