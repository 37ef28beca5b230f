"""Prompts that are as long as asked for: as many words, sentences or documents as fit the model's own tokens."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from kvjax.checkpoints import Tokenizer
from kvjax.evaluation.tasks.base import Sample, text_sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A sample before it is tokens.

    Attributes:
      context: What is compressed.
      question: What comes next, up to where the answer begins.
      answers: As a model would write them, any of them.
      references: What a written answer is scored against.
      info: See `Sample`.
      cut: What stands at the end of a context that was too long and lost its end; None: it loses its middle.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    references: tuple[str, ...] = ()
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cut: str | None = None


def most(cost: Callable[[int], int], room: int, least: int) -> int | None:
    """The largest number whose cost fits, within about one unit; what is returned has been tried.

    Args:
      cost: Of a number of units; roughly linear.
      room: What it may cost.
      least: The smallest number that makes sense, at least 1.

    Returns:
      None if not even the smallest fits.
    """
    number, spent, above = least, cost(least), None
    slope = max(spent / least, 1e-6)  # Too steep, because of what every number costs; the next one tells.
    while spent <= room and (above is None or above - number > 1):
        step = int((room - spent) / slope)
        if step < 1:
            break
        tried = number + step if above is None else min(number + step, above - 1)
        found = cost(tried)
        slope = max((found - spent) / (tried - number), 1e-6)
        if found <= room:
            number, spent = tried, found
        else:
            above = tried
    return number if spent <= room else None


def fitted(
    tokenizer: Tokenizer,
    make: Callable[[int], Prompt],
    id: str,
    length: int,
    least: int = 1,
    tokens: int = 0,
    **more: Any,
) -> Sample:
    """The sample of the longest prompt that fits.

    Args:
      make: The prompt of so many units of filling; the same for the same number.
      id: Of the sample.
      length: Tokens of context and question together, at most; what is to be written (`tokens`) comes off.
      least: The smallest number of units.
      tokens: Written at most: `Sample.max_new_tokens`.
      **more: Further fields of the sample.

    Raises:
      ValueError: Not even the smallest prompt fits.
    """

    def cost(number: int) -> int:
        prompt = make(number)
        return len(tokenizer.encode(prompt.context)) + len(tokenizer.encode(prompt.question, add_bos=False))

    number = most(cost, length - tokens, least)
    if number is None:
        written = f", of which {tokens} are for the answer," if tokens else ""
        raise ValueError(
            f"A length of {length} tokens{written} has no room for the task: it takes {cost(least) + tokens} at least."
        )
    prompt = make(number)
    return text_sample(
        tokenizer,
        id=id,
        context=prompt.context,
        question=prompt.question,
        answers=prompt.answers,
        references=prompt.references,
        max_new_tokens=tokens,
        info=prompt.info,
        **more,
    )
