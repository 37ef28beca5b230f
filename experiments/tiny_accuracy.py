"""How well does kvjax-tiny find things, with its full cache?

    python experiments/tiny_accuracy.py --out results/tiny_accuracy

Needles (one of one, one of four) as `kvjax compare` asks them, pairs "word: 12345" of which one is asked for, and the
perplexity of text that was held out from training. Prompts of 1,024 tokens, and 2,000 for one needle; the prompt is
prefilled, the answer written greedily, and counted if every digit is right. Writes `accuracy.json`; what it says
already of this model and as many samples is not asked again. About ten minutes on two CPU cores for 200 samples each.

Measured (docs/models/tiny/README.md; float32, 2 CPU cores):

    needle, 1,024 tokens               200 samples       100 % right
    pairs, 1,024 tokens                200 samples      99.5 % right
    held-out docstrings, code          512 tokens       perplexity 15.6, 6.8
"""

import argparse
import functools
import json
import math
import pathlib
import random
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tiny_data
from rich.progress import track

import kvjax
from kvjax.commands.common import write_whole
from kvjax.evaluation import make_task

ROWS = 8  # Prompts of a batch.
Question = tuple[list[int], list[int]]  # Prompt with its question; answer.


def needles(model: kvjax.Model, context: int, count: int, number: int) -> Iterator[Question]:
    """One sample of each of `number` contexts."""
    samples = make_task("needle", context=context, count=number, needles=count, seed=1).samples(model)
    for i in range(number):
        sample = samples[i * count + i % count]  # The needles of one context follow one another.
        yield [*sample.context_ids, *sample.question_ids], list(sample.answers[0])


def pairs(model: kvjax.Model, context: int, number: int) -> Iterator[Question]:
    """Lines "word: 12345" that fill a context; one word's line is begun again."""
    assert model.tokenizer is not None
    manual = " ".join(text for name, text in tiny_data.library()[0] if name.startswith("topics/"))
    words = sorted(set(re.findall(r"\b[a-z]{4,8}\b", manual)))
    for i in range(number):
        chance = random.Random(f"pairs/{i}")
        lines, ids = [], [model.config.bos_id]
        for word in chance.sample(words, len(words)):
            line = f"{word}: {chance.randrange(10_000, 100_000)}\n"
            more = model.tokenizer.encode(line, add_bos=False)
            if len(ids) + len(more) > context:
                break
            lines.append(line)
            ids += more
        word, value = chance.choice(lines).strip().split(": ")
        question = model.tokenizer.encode(f"{word}: {value}", add_bos=False)
        answer = model.tokenizer.encode(value, add_bos=False)
        yield ids + question[: -len(answer)], answer


def accuracy(model: kvjax.Model, questions: list[Question], what: str) -> float:
    right = 0
    for start in track(range(0, len(questions), ROWS), description=what):
        batch = questions[start : start + ROWS]
        prompts = [prompt for prompt, _ in batch]
        prompts += prompts[:1] * (ROWS - len(batch))  # One shape, one compilation.
        longest = max(len(answer) for _, answer in batch)
        written = model.generate(prompts, max_new_tokens=longest, stop=())
        right += sum(out[: len(answer)] == answer for out, (_, answer) in zip(written, batch, strict=False))
    return right / len(questions)


def perplexity(model: kvjax.Model, prefix: str, context: int, number: int) -> float:
    """Of held-out documents whose names begin with `prefix`, over windows of `context` tokens."""
    assert model.tokenizer is not None
    prose, code = tiny_data.library()
    texts = [text for name, text in prose + code if name.startswith(prefix) and tiny_data.held_out(name)]
    ids = [i for text in texts for i in [*model.tokenizer.encode(text, add_bos=False), tiny_data.EOS_ID]]
    chance, total = random.Random(f"text/{prefix}"), []
    for _ in track(range(number), description=f"text, {prefix}"):
        start = chance.randrange(max(1, len(ids) - context))
        window = jnp.asarray([[model.config.bos_id, *ids[start : start + context - 1]]], jnp.int32)
        logs = jax.nn.log_softmax(kvjax.forward(model.params, model.config, window)[0, :-1])
        total.append(np.asarray(jnp.take_along_axis(logs, window[0, 1:, None], -1)).mean())
    return math.exp(-float(np.mean(total)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name or folder")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--only", default=None, help="of the tasks below, those that contain this")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/tiny_accuracy"))
    args = parser.parse_args()
    model, number = kvjax.load(args.model), args.samples
    tasks = {
        "needle": lambda: needles(model, 1024, 1, number),
        "pairs": lambda: pairs(model, 1024, number),
        "one needle of four": lambda: needles(model, 1024, 4, number),
        "needle in 2,000 tokens": lambda: needles(model, 2000, 1, max(1, number // 4)),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "accuracy.json"

    def ask(name: str, measure: Callable[[], dict[str, float]]) -> None:
        found = json.loads(path.read_text()) if path.is_file() else {}
        about = {"model": args.model, "of": number}
        if args.only is not None and args.only not in name:
            return
        if {key: found.get(name, {}).get(key) for key in about} != about:
            found[name] = about | measure()
            write_whole(path, json.dumps(found, indent=2) + "\n")
        print(f"{name}: {found[name]}", flush=True)

    def answers(name: str) -> dict[str, float]:
        questions = list(tasks[name]())
        return {"samples": len(questions), "right": accuracy(model, questions, name)}

    def text(prefix: str) -> dict[str, float]:
        windows = max(1, number // 10)
        return {"windows": windows, "perplexity": round(perplexity(model, prefix, 512, windows), 2)}

    for name in tasks:
        ask(name, functools.partial(answers, name))
    for prefix in ("doc/", "code/"):  # The manual's topics overlap one another.
        ask(f"perplexity of held-out {prefix[:-1]}", functools.partial(text, prefix))


if __name__ == "__main__":
    main()
