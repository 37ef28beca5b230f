"""Conversations about one long context: what SCBench asks, made here at any length and for any tokenizer."""

import dataclasses
import math
import random
import string
from collections.abc import Callable, Mapping
from typing import Any

from kvjax.evaluation.tasks.retrieval import json_object
from kvjax.evaluation.tasks.ruler_vt import INTRODUCTION, QUESTION, assignments
from kvjax.evaluation.tasks.vocabulary import ADJECTIVES, NOUNS, identifier

LABELS = ("Alpha", "Beta", "Gamma", "Delta")
KINDS_OF_THINGS = 8  # Adjectives in many-shot examples; each has its label.
HOPS = 2
STRINGS = (
    "Below is a list of strings, one on every line. You will be asked for the only one that begins with a given prefix "
    "and ends with a given suffix.\n\n"
)
SHOTS = "Every thing belongs to one of four classes. Learn from the examples to which.\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """A question and what is right.

    Attributes:
      fields: What the templates of a prompt are filled with.
      answer: As it stands in the conversation once the next question comes.
      answers: Texts that count, any of them.
      references: What a written answer is scored against.
      info: What else a row should say.
      metric: Where a conversation asks for different things; otherwise the task's.
    """

    fields: Mapping[str, str]
    answer: str
    answers: tuple[str, ...]
    references: tuple[str, ...]
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metric: str | None = None


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A context, and the questions about it in turn."""

    context: str
    turns: tuple[Turn, ...]


def key_values(chance: random.Random, pairs: int, turns: int) -> Conversation:
    """Values of keys in a JSON object of UUIDs."""
    records = [(identifier(chance), identifier(chance)) for _ in range(pairs)]

    def turn(i: int) -> Turn:
        key, value = records[i]
        question = f'Key: "{key}"\nThe value associated with the specified key is: '
        return _turn(question, (value,), {"depth": round(i / (pairs - 1), 4)})

    return Conversation(
        "JSON data:\n" + json_object(records), tuple(turn(i) for i in chance.sample(range(pairs), turns))
    )


def variables(chance: random.Random, lines: int, turns: int) -> Conversation:
    """Chains of assignments in noise; every turn asks for another chain's variables."""
    text, chains, values = assignments(chance, lines, turns, HOPS)

    def turn(chain: list[str], value: str) -> Turn:
        question = QUESTION.format(value=value, number=HOPS + 1).lstrip("\n")
        return _turn(question, tuple(chain))

    return Conversation(INTRODUCTION + text, tuple(map(turn, chains, values)))


def prefix_suffix(chance: random.Random, strings: int, turns: int) -> Conversation:
    """Strings of which many begin alike and many end alike, but no two do both."""
    size = math.ceil(math.sqrt(2 * strings))

    def letters(number: int) -> str:
        return "".join(chance.choices(string.ascii_lowercase + string.digits, k=number))

    starts, ends = (sorted({letters(5) for _ in range(2 * size)})[:size] for _ in range(2))
    pairs = [divmod(i, len(ends)) for i in chance.sample(range(len(starts) * len(ends)), strings)]
    written = [(starts[a], ends[b], starts[a] + letters(12) + ends[b]) for a, b in pairs]

    def turn(i: int) -> Turn:
        start, end, whole = written[i]
        question = f'Prefix: "{start}"\nSuffix: "{end}"\nThe string is: '
        return _turn(question, (whole,), {"depth": round(i / (strings - 1), 4)})

    lines = "\n".join(whole for _, _, whole in written)
    return Conversation(STRINGS + lines, tuple(turn(i) for i in chance.sample(range(strings), turns)))


def many_shot(chance: random.Random, shots: int, turns: int) -> Conversation:
    """Examples of classes that depend on a thing's adjective alone; every turn asks for a thing that is no example."""
    adjectives = chance.sample(ADJECTIVES, KINDS_OF_THINGS)
    classes = {adjective: LABELS[i % len(LABELS)] for i, adjective in enumerate(adjectives)}
    asked = [(chance.choice(adjectives), noun) for noun in chance.sample(NOUNS, turns)]
    others = [noun for noun in NOUNS if noun not in {noun for _, noun in asked}]
    examples = [(adjectives[i % len(adjectives)], chance.choice(others)) for i in range(shots)]
    chance.shuffle(examples)
    lines = "\n".join(f"Thing: {adjective} {noun}\nClass: {classes[adjective]}" for adjective, noun in examples)
    return Conversation(
        SHOTS + lines,
        tuple(_turn(f"Thing: {adjective} {noun}\nClass:", (classes[adjective],)) for adjective, noun in asked),
    )


def _turn(question: str, references: tuple[str, ...], info: Mapping[str, Any] | None = None) -> Turn:
    answer = ", ".join(references)
    answer = answer if question.endswith(" ") else " " + answer
    return Turn(fields={"input": question}, answer=answer, answers=(answer,), references=references, info=info or {})


@dataclasses.dataclass(frozen=True)
class Generator:
    """How a kind of conversation is made.

    Attributes:
      make: Of a source of chance, so many units of filling and so many turns.
      least: The smallest number of units, of the number of turns.
    """

    make: Callable[[random.Random, int, int], Conversation]
    least: Callable[[int], int]


GENERATORS = {
    "kv": Generator(key_values, lambda turns: max(turns, 2)),
    "vt": Generator(variables, lambda turns: HOPS + 1),
    "prefix_suffix": Generator(prefix_suffix, lambda turns: max(turns, 2)),
    "many_shot": Generator(many_shot, lambda turns: KINDS_OF_THINGS),
}
