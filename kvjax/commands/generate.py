"""`kvjax generate`: text on a compressed cache."""

import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer

from kvjax.commands import complete
from kvjax.commands.common import notes, user_errors
from kvjax.commands.options import MODEL, DtypeOption, MeshOption, ModelOption, SeedOption, load


def generate(
    prompt: Annotated[str | None, typer.Argument(help='The prompt; "-" or none reads stdin.')] = None,
    file: Annotated[pathlib.Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    policy: Annotated[str, typer.Option(help="See `kvjax methods`.", autocompletion=complete.policies)] = "full",
    model: ModelOption = MODEL,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that reach this probability together.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Only tokens this likely, relative to the likeliest.")] = 0.0,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
) -> None:
    """Continues a prompt, token by token, on a compressed cache.

    The text goes to stdout; prompt, cache bytes and speed to stderr.

    **Examples**

    `kvjax generate "The three laws of robotics are"`

    `kvjax generate --file paper.txt --policy "snapkv(512) | kivi(bits=4)" -n 200`

    `cat notes.txt | kvjax generate --policy "streaming_llm(1024)" --temperature 0.8 --top-p 0.95 --seed 1`
    """
    with user_errors():
        import jax

        import kvjax
        from kvjax.generation import prefill_logits, stream_on

        if prompt is not None and file is not None:
            raise ValueError("Give the prompt as an argument or with --file, not both.")
        chosen = kvjax.parse_policy(policy)
        sampler = kvjax.Sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        if max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {max_new_tokens}.")
        text = _prompt(prompt, file)
        if not text:
            raise ValueError("The prompt is empty: give at least one token.")
    loaded = load(model, dtype, [], mesh)
    with user_errors():
        tokens, lengths = loaded.encode(text)
        length, config = int(lengths[0]), loaded.config
        if length + max_new_tokens > config.max_length:
            raise ValueError(
                f"A prompt of {length} tokens and {max_new_tokens} new ones exceed the model's context of "
                f"{config.max_length}."
            )
        kvjax.plan(chosen, config, length, loaded.params["embed"].dtype)
    assert loaded.tokenizer is not None
    with notes.status(f"Reading {length:,} tokens; the first time they are compiled for ..."):
        logits, cache = prefill_logits(loaded.params, config, chosen, tokens, lengths)
        jax.block_until_ready(cache)
    size = f"{cache.nbytes / 1e6:.2f} MB, {cache.compression:.2f}x compression against a full bfloat16 cache"
    ids = stream_on(
        loaded.params,
        config,
        cache.policy,
        cache,
        logits,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        key=jax.random.key(seed),
        stop=config.eos_ids,
    )
    count, start = 0, time.perf_counter()

    def counted() -> Iterator[int]:
        nonlocal count
        for token in ids:
            if token not in config.eos_ids:
                count += 1
                yield token

    for piece in loaded.tokenizer.stream(counted()):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    seconds = time.perf_counter() - start
    notes.print(
        f"{length:,} tokens of prompt · cache after them: {size} ({chosen}) · {count} new tokens in {seconds:.1f} s, "
        "compilation included",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def _prompt(prompt: str | None, file: pathlib.Path | None) -> str:
    if file is not None:
        return file.read_text(encoding="utf-8")
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            notes.print("Reading the prompt from the terminal; end it with Ctrl-D.", style="dim")
        return sys.stdin.read()
    return prompt
