"""What `train_tiny.py` trains on: text that ships with Python, and recall tasks made of it, as token ids in NumPy.

A sample is a row of ids with a weight for each: above 0 for the tokens of an answer (1 / sqrt(tokens of the row's
answers), so that rows with many answers do not drown those with one), 0 for text, `IGNORED` for what nobody can
predict, such as a random number when it is told, and for the text in which it is hidden: there is so little text that
it would be learned by heart. All text is tokenized once; samples are put together from pieces.
Everything is drawn from a `numpy.random.Generator`; nothing is downloaded.
"""

import ast
import dataclasses
import hashlib
import math
import pathlib
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tokenizers
from numpy.random import Generator
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
IGNORED = -1.0
CITIES = (  # Those of kvjax.evaluation.tasks.
    "Paris London Tokyo Cairo Lima Oslo Rome Madrid Berlin Vienna Prague Athens Dublin Lisbon Warsaw Delhi Seoul "
    "Sydney Toronto Chicago Boston Denver Nairobi Lagos Havana Quito Hanoi Bangkok Manila Moscow Helsinki Geneva"
).split()
# The first is what `kvjax compare --task needle` says and asks.
NEEDLES = (
    (
        "\nOne of the special magic numbers for {key} is: {value}.\n",
        "\nWhat is the special magic number for {key} mentioned in the provided text?\n"
        "The special magic number for {key} mentioned in the provided text is: {value}\n",
    ),
    (
        "\nOne of the special magic words for {key} is: {value}.\n",
        "\nWhat is the special magic word for {key} mentioned in the provided text? "
        "The special magic word for {key} mentioned in the provided text is: {value}\n",
    ),
    (
        "\nThe secret code of {key} is {value}.\n",
        "\nQuestion: What is the secret code of {key}?\nAnswer: {value}\n",
    ),
    (
        "\nRemember that the number of {key} is {value}.\n",
        "\nWhat is the number of {key}? The number of {key} is {value}\n",
    ),
    (
        "\n{key} lives in house {value}.\n",
        "\nIn which house does {key} live?\n{key} lives in house {value}\n",
    ),
    (
        "\nNote: {key} costs {value} today.\n",
        "\nHow much does {key} cost? It costs {value}\n",
    ),
)
PASSKEY = (
    "\nThe pass key is {value}. Remember it. {value} is the pass key.\n",
    "\nWhat is the pass key? The pass key is {value}\n",
)
# A pair as it is listed, and as it is asked for.
PAIRS = (
    ("{key}: {value}\n", "{key}: {value}\n"),
    ("{key}: {value}\n", "\nWhat is the value of {key}?\n{key}: {value}\n"),
    ("{key} = {value}\n", "{key} = {value}\n"),
    ("{key} -> {value}\n", "{key} -> {value}\n"),
    ('"{key}": "{value}",\n', '"{key}": "{value}",\n'),
    ("{key}={value}\n", "\n>>> {key}\n{value}\n"),
)


# Text


def library(root: str | None = None) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, text) of prose (docstrings, the manual's topics, the licence) and of code (modules without docstrings)."""
    from pydoc_data.topics import topics

    base = pathlib.Path(root or sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "encodings", "pydoc_data"}  # The last two are tables, and the topics.
    prose = [(f"topics/{name}", text) for name, text in sorted(topics.items())]
    prose += [("LICENSE", path.read_text()) for path in [base / "LICENSE.txt"] if path.is_file()]
    code, seen = [], set()
    for path in sorted(base.rglob("*.py")):
        relative = path.relative_to(base)
        if skip & set(relative.parts[:-1]) or relative.name.startswith("_sysconfigdata"):  # Of one machine only.
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(source)
        except (SyntaxError, ValueError, OSError):
            continue
        strings, lines = [], source.splitlines(keepends=True)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = ast.get_docstring(node)
            if text and len(text) >= 40:
                expression = node.body[0]
                for i in range(expression.lineno - 1, expression.end_lineno or expression.lineno):
                    lines[i] = ""
                if text not in seen:
                    seen.add(text)
                    strings.append(text)
        rest = "".join(lines)
        if strings:
            prose.append((f"doc/{relative}", "\n\n".join(strings)))
        if len(rest) >= 200 and rest not in seen:
            seen.add(rest)
            code.append((f"code/{relative}", rest))
    return prose, code


def held_out(name: str) -> bool:
    """Whether a document is kept from training: about one in sixteen, by its name."""
    return hashlib.sha256(name.encode()).digest()[0] % 16 == 0


def train_tokenizer(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE whose digits stand alone, so that numbers are copied digit by digit."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return backend


# Pieces


@dataclasses.dataclass(frozen=True)
class Template:
    """A text with places for a key and a value: ids between them, and what comes where.

    Attributes:
      parts: Arrays of ids, "key", " key", "value" or " value" (with a space in front).
      length: Ids, keys and values not counted.
    """

    parts: tuple

    @property
    def length(self) -> int:
        return sum(len(part) for part in self.parts if not isinstance(part, str))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids of texts, and the pieces that samples are made of.

    Attributes:
      prose, code: int16 streams of documents, each followed by EOS.
      keys: Ids of each key, at the start of a line and after a space.
      words: Ids of single-token words, with a space in front.
      needles, passkey, pairs: As above, tokenized: (statement, question).
      variable: Statement of a value, of another name, and question.
      digits: The ten digits. space: " ". newline: "\\n".
      haystack: Weight of text in which something is hidden.
    """

    prose: np.ndarray
    code: np.ndarray
    vocab: int
    keys: tuple[tuple[np.ndarray, np.ndarray], ...]
    cities: tuple[tuple[np.ndarray, np.ndarray], ...]
    words: np.ndarray
    needles: tuple[tuple[Template, Template], ...]
    passkey: tuple[Template, Template]
    pairs: tuple[tuple[Template, Template], ...]
    variable: tuple[Template, Template, Template]
    digits: np.ndarray
    space: np.ndarray
    newline: np.ndarray
    haystack: float = IGNORED


def encode(backend: tokenizers.Tokenizer, text: str) -> np.ndarray:
    return np.asarray(backend.encode(text, add_special_tokens=False).ids, np.int16)


def template(backend: tokenizers.Tokenizer, text: str) -> Template:
    parts: list = []
    for part in re.split(r"( ?\{key\}| ?\{value\})", text):
        if part.strip() in ("{key}", "{value}"):
            parts.append(part.replace("{", "").replace("}", ""))
        elif part:
            parts.append(encode(backend, part))
    return Template(tuple(parts))


def stream(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Documents one after another, each followed by EOS."""
    encoded = backend.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.asarray([*one.ids, EOS_ID], np.int16) for one in encoded] or [np.zeros(0, np.int16)])


def make_corpus(backend: tokenizers.Tokenizer, prose: np.ndarray, code: np.ndarray) -> Corpus:
    vocabulary = backend.get_vocab()
    # Whole words: with a space in front ("Ġ" in byte-level spelling) they are one token.
    words = sorted(piece[1:] for piece in vocabulary if re.fullmatch(r"Ġ[a-z]{3,}", piece) and len(piece) > 3)
    rng = np.random.default_rng(0)
    pick = lambda: words[rng.integers(len(words))]  # noqa: E731
    names = list(words) + [word.capitalize() for word in words] + CITIES * 4
    names += [f"{pick()}-{pick()}" for _ in range(1500)]
    names += [f"{pick()}_{pick()}" for _ in range(500)]
    names += [str(rng.integers(1000, 100000)) for _ in range(1500)]
    names += ["".join(chr(65 + c) for c in rng.integers(26, size=rng.integers(2, 5))) for _ in range(500)]
    both = lambda name: (encode(backend, name), encode(backend, " " + name))  # noqa: E731
    pair = lambda texts: (template(backend, texts[0]), template(backend, texts[1]))  # noqa: E731
    return Corpus(
        prose=prose,
        code=code,
        vocab=backend.get_vocab_size(),
        keys=tuple(both(name) for name in names),
        cities=tuple(both(name) for name in CITIES),
        words=np.asarray([vocabulary["Ġ" + word] for word in words], np.int16),
        needles=tuple(pair(texts) for texts in NEEDLES),
        passkey=pair(PASSKEY),
        pairs=tuple(pair(texts) for texts in PAIRS),
        variable=(
            template(backend, "\nVAR {key} = {value}\n"),
            template(backend, "\nVAR {key} = VAR {value}\n"),
            template(backend, "\nWhat is the value of VAR {key}? VAR {key} = {value}\n"),
        ),
        digits=np.asarray([encode(backend, str(digit))[0] for digit in range(10)], np.int16),
        space=encode(backend, " "),
        newline=encode(backend, "\n"),
    )


# Values and filled templates: ids and weights

Key = tuple[np.ndarray, np.ndarray]
Row = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Value:
    """What is told and asked: ids, and ids that set it apart from a word before it (a space that is its own token)."""

    ids: np.ndarray
    lead: np.ndarray

    @property
    def length(self) -> int:
        return len(self.ids)


NOTHING = np.zeros(0, np.int16)


def number(corpus: Corpus, rng: Generator, length: int) -> Value:
    ids = corpus.digits[rng.integers(10, size=length)]
    ids[0] = corpus.digits[rng.integers(1, 10)]
    return Value(ids, corpus.space)


def values(corpus: Corpus, rng: Generator, count: int, length: int = 0) -> list[Value]:
    """Numbers of one length, 3 to 8 digits, or (one time in six) one or two words."""
    if not length and rng.random() < 1 / 6:
        size = rng.integers(1, 3)
        return [Value(corpus.words[rng.integers(len(corpus.words), size=size)], NOTHING) for _ in range(count)]
    length = length or int(rng.integers(3, 9))
    return [number(corpus, rng, length) for _ in range(count)]


def choose(rng: Generator, pool: Sequence[Key], count: int) -> list[Key]:
    """Different keys."""
    chosen, seen = [], set()
    while len(chosen) < count:
        key = pool[int(rng.integers(len(pool)))]
        if (name := key[0].tobytes()) not in seen:
            seen.add(name)
            chosen.append(key)
    return chosen


def fill(this: Template, key: Key | None, value: Value, weight: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids and weights of a filled template; `weight` is the value's, the rest is ignored as nothing can predict it."""
    ids: list[np.ndarray] = []
    weights: list[np.ndarray] = []

    def add(part: np.ndarray, weight: float) -> None:
        ids.append(part)
        weights.append(np.full(len(part), weight, np.float32))

    for part in this.parts:
        if not isinstance(part, str):
            add(part, IGNORED)
        elif part.strip() == "key":
            assert key is not None
            add(key[int(part[0] == " ")], IGNORED)
        else:
            if part[0] == " ":
                add(value.lead, IGNORED)
            add(value.ids, weight)
    return ids, weights


def told(this: Template, key: Key | None, value: Value) -> Row:
    ids, weights = fill(this, key, value, IGNORED)
    return np.concatenate(ids), np.concatenate(weights)


def asked(this: Template, key: Key | None, value: Value) -> Row:
    """The value is the answer, and with it the token that ends it: a line break, or a quotation mark."""
    ids, weights = fill(this, key, value, 1.0)
    row, weight = np.concatenate(ids), np.concatenate(weights)
    weight[int(np.flatnonzero(weight > 0)[-1]) + 1] = 1.0
    return row, weight


def join(rows: Sequence[Row]) -> Row:
    return np.concatenate([ids for ids, _ in rows]), np.concatenate([weights for _, weights in rows])


def text(corpus: Corpus, rng: Generator, length: int, prose: float = 0.25, weight: float = 0.0) -> Row:
    """A stretch of prose (so often) or code. There is much less prose."""
    source = corpus.prose if rng.random() < prose else corpus.code
    start = rng.integers(max(1, len(source) - length))
    ids = np.resize(source[start : start + length], length)
    return ids, np.full(length, weight, np.float32)


def filler(corpus: Corpus, rng: Generator, length: int) -> Row:
    """Text in which something is hidden."""
    return text(corpus, rng, length, prose=0.6, weight=corpus.haystack)


def scattered(corpus: Corpus, rng: Generator, length: int, told: Sequence[Row], asked: Sequence[Row]) -> Row:
    """Statements at random places of a text, questions at its end or (one time in four) within it."""
    last = join(asked)
    room = length - sum(len(ids) for ids, _ in told) - len(last[0])
    ids, weights = filler(corpus, rng, max(room, 0))
    after = int(rng.integers(room // 3 + 1)) if room > 0 and rng.random() < 0.25 else 0
    cuts = np.sort(rng.integers(max(room, 0) - after + 1, size=len(told)))
    rows, start = [], 0
    for cut, row in zip(cuts, told, strict=True):
        rows += [(ids[start:cut], weights[start:cut]), row]
        start = cut
    end = len(ids) - after
    return join([*rows, (ids[start:end], weights[start:end]), last, (ids[end:], weights[end:])])


# Tasks: (corpus, rng, length) -> ids and weights of about `length`; what is too long is cut, too short filled with text


def needle(corpus: Corpus, rng: Generator, length: int) -> Row:
    which = 0 if rng.random() < 0.5 else rng.integers(len(corpus.needles))
    statement, question = corpus.needles[which]
    pool = corpus.cities if rng.random() < 0.4 else corpus.keys
    most = max(1, min(12, (length - 80) // 90))
    count = 1 if rng.random() < 0.3 else int(rng.integers(1, most + 1))
    keys = choose(rng, pool, count)
    chosen = values(corpus, rng, count, length=7 if rng.random() < 0.5 else 0)
    queries = rng.permutation(count)[: max(1, min(count, (length - count * 25) // 60))]
    tell = [told(statement, key, value) for key, value in zip(keys, chosen, strict=True)]
    return scattered(corpus, rng, length, tell, [asked(question, keys[i], chosen[i]) for i in queries])


def passkey(corpus: Corpus, rng: Generator, length: int) -> Row:
    (value,) = values(corpus, rng, 1, length=int(rng.integers(4, 8)))
    statement, question = corpus.passkey
    return scattered(corpus, rng, length, [told(statement, None, value)], [asked(question, None, value)])


def pairs(corpus: Corpus, rng: Generator, length: int) -> Row:
    """A list of keys and values; then, or in between, keys that were listed are asked for."""
    statement, question = corpus.pairs[rng.integers(len(corpus.pairs))]
    words, digits = rng.random() < 1 / 6, int(rng.integers(2, 8))
    size = len(told(statement, corpus.keys[0], number(corpus, rng, 1 if words else digits))[0]) + 2
    share = rng.uniform(0.3, 0.95)
    count = max(2, int(share * length / size))
    keys = choose(rng, corpus.keys, count)
    told_values = [
        Value(corpus.words[rng.integers(len(corpus.words), size=1)], NOTHING) if words else number(corpus, rng, digits)
        for _ in range(count)
    ]
    rows: list[Row] = []
    total = 0
    if rng.random() < 0.5:  # All pairs first, then as many questions as there is room for.
        rows = [told(statement, key, value) for key, value in zip(keys, told_values, strict=True)]
        total = sum(len(ids) for ids, _ in rows)
        if rng.random() < 0.3:  # The list lies within a text.
            extra = filler(corpus, rng, max(0, int((length - total) * rng.uniform(0.2, 0.8))))
            rows = [extra, *rows] if rng.random() < 0.5 else [*rows, extra]
            total += len(extra[0])
        while total < length:
            i = rng.integers(count)
            rows.append(asked(question, keys[i], told_values[i]))
            total += len(rows[-1][0])
        return join(rows)
    known = 0
    while total < length:  # New pairs and questions in turn.
        if known < 2 or (known < count and rng.random() < share):
            rows.append(told(statement, keys[known], told_values[known]))
            known += 1
        else:
            i = rng.integers(known)
            rows.append(asked(question, keys[i], told_values[i]))
        total += len(rows[-1][0])
    return join(rows)


def repeat(corpus: Corpus, rng: Generator, length: int) -> Row:
    """A stretch of random tokens, or of text, again and again."""
    period = int(rng.integers(8, max(9, length // 2)))
    if rng.random() < 0.3:
        ids, weights = filler(corpus, rng, period)
    else:
        some = rng.integers(2, corpus.vocab, size=int(rng.choice([32, 256, 2048])))
        ids, weights = some[rng.integers(len(some), size=period)].astype(np.int16), np.full(period, IGNORED, np.float32)
    out = np.resize(ids, length)
    again = np.ones(length, np.float32)
    again[:period] = weights[:length]
    again[period : period + 2] = IGNORED  # Where it begins again cannot be known.
    return out, again


def recall(corpus: Corpus, rng: Generator, length: int) -> Row:
    """Pairs of single tokens in any order; the second of a pair can be known once the pair was seen."""
    count = int(rng.integers(4, max(5, length // 6)))
    tokens = rng.permutation(np.arange(2, corpus.vocab))[: 2 * count].astype(np.int16)
    order = rng.integers(count, size=length // 2 + 1)
    ids = np.stack([tokens[order], tokens[count + order]], axis=1).reshape(-1)
    first = np.zeros(len(order), bool)
    first[np.unique(order, return_index=True)[1]] = True
    weights = np.stack([np.full(len(order), IGNORED), np.where(first, IGNORED, 1.0)], axis=1).reshape(-1)
    return ids[:length], weights[:length].astype(np.float32)


def variables(corpus: Corpus, rng: Generator, length: int) -> Row:
    """Names for numbers, and names for names: one step to follow, light variable tracking."""
    count = int(rng.integers(1, max(2, min(6, length // 120) + 1)))
    statement, alias, question = corpus.variable
    names = choose(rng, corpus.keys, 2 * count)
    given = values(corpus, rng, count, length=5)
    tell = [told(statement, names[i], given[i]) for i in range(count)]
    tell += [told(alias, names[count + i], Value(names[i][1], NOTHING)) for i in range(count)]
    ask = []
    for i in rng.permutation(2 * count)[: max(1, length // 100)]:
        ask.append(asked(question, names[i], given[i % count]))
    return scattered(corpus, rng, length, tell, ask)


TASKS: dict[str, Callable[[Corpus, Generator, int], Row]] = {
    "text": text,
    "needle": needle,
    "passkey": passkey,
    "pairs": pairs,
    "repeat": repeat,
    "recall": recall,
    "variables": variables,
}
NAMES = tuple(TASKS)


def finish(corpus: Corpus, rng: Generator, row: Row, length: int) -> Row:
    """BOS in front, exactly `length` ids, the weights of answers scaled."""
    ids, weights = row
    missing = length - 1 - len(ids)
    if missing > 0:
        more = filler(corpus, rng, missing)
        ids, weights = np.concatenate([ids, more[0]]), np.concatenate([weights, more[1]])
    ids = np.concatenate([[BOS_ID], ids[: length - 1]])
    weights = np.concatenate([[IGNORED], weights[: length - 1]])
    answers = int((weights > 0).sum())
    return ids, np.where(weights > 0, 1 / math.sqrt(max(answers, 1)), weights)


def batch(
    corpus: Corpus, rng: Generator, shape: tuple[int, int], mixture: dict[str, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids int16 and weights float16 [rows, length], and each row's task as an index of `NAMES`, uint8 [rows]."""
    rows, length = shape
    names = list(mixture)
    chances = np.asarray(list(mixture.values())) / sum(mixture.values())
    ids, weights = np.empty(shape, np.int16), np.empty(shape, np.float16)
    kinds = rng.choice(len(names), size=rows, p=chances)
    for i, kind in enumerate(kinds):
        row = TASKS[names[kind]](corpus, rng, length - 1)
        ids[i], weights[i] = finish(corpus, rng, row, length)
    return ids, weights, np.asarray([NAMES.index(names[kind]) for kind in kinds], np.uint8)


# What accuracy is measured on


def needle_row(corpus: Corpus, rng: Generator, context: int, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of the answer: `count` needles in `context` tokens, BOS included, and a question about one of them,
    as `kvjax compare --task needle` puts it."""
    statement, question = corpus.needles[0]
    keys = choose(rng, corpus.cities, count)
    chosen = [number(corpus, rng, 7) for _ in range(count)]
    which = int(rng.integers(count))
    tell = [told(statement, key, value) for key, value in zip(keys, chosen, strict=True)]
    source = corpus.prose
    room = context - 1 - sum(len(ids) for ids, _ in tell)
    start = int(rng.integers(len(source)))
    filler = source[(start + np.arange(room)) % len(source)]
    cuts = np.sort(rng.integers(room + 1, size=count))
    parts, before = [np.asarray([BOS_ID], np.int16)], 0
    for cut, (ids, _) in zip(cuts, tell, strict=True):
        parts += [filler[before:cut], ids]
        before = cut
    ids, weights = asked(question, keys[which], chosen[which])
    parts += [filler[before:], ids]
    mask = np.zeros(context + len(ids), bool)
    mask[context:] = weights > 0
    return np.concatenate(parts), mask


def pairs_row(corpus: Corpus, rng: Generator, context: int, digits: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of the answer: lines "word: 12345" that fill `context` tokens, BOS included, then one of the words
    is asked for by beginning its line again."""
    statement, question = corpus.pairs[0]
    pool = corpus.keys[: len(corpus.words)]
    parts, lines, total = [np.asarray([BOS_ID], np.int16)], [], 1
    for key in choose(rng, pool, min(len(pool), context // 6)):
        value = number(corpus, rng, digits)
        ids, _ = told(statement, key, value)
        if total + len(ids) > context:
            break
        lines.append((key, value))
        parts.append(ids)
        total += len(ids)
    key, value = lines[rng.integers(len(lines))]
    # The beginning of a text fills what is left, so that all prompts are equally long.
    parts.insert(1, corpus.prose[: context - total])
    ids, weights = asked(question, key, value)
    parts.append(ids)
    mask = np.zeros(context + len(ids), bool)
    mask[context:] = weights > 0
    return np.concatenate(parts), mask
