"""What is asked of whom: policies and settings, samples under a protocol, and whether all of it can be served."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp

from kvjax.evaluation.score import PIECE
from kvjax.evaluation.tasks import Ids, Sample, Task
from kvjax.model import Model, bucket
from kvjax.policies import Budget, Policy, PolicyError, methods, parse_policy, plan

ROOM = 256  # Room for answers comes in multiples of this, so that few sizes are compiled.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a task is run.

    Attributes:
      policies: The full cache comes first: it is what the others are measured against.
      protocol: "aware": the question is part of the compressed prompt, only its last token comes after. "agnostic": the
        context is compressed first, the question comes after. Perplexity is agnostic always.
      tokens: Length of the full cache's greedy continuation, along which predictions are compared. Its predictions are
        kept while a sample is asked: tokens * vocab_size * 4 bytes.
      speed: Whether decoding is timed.
    """

    policies: tuple[Policy, ...]
    protocol: Literal["aware", "agnostic"] = "aware"
    tokens: int = 16
    speed: bool = True

    def __post_init__(self):
        if self.protocol not in ("aware", "agnostic"):
            raise ValueError(f"The protocol is aware or agnostic, got {self.protocol!r}.")
        if self.tokens < 1:
            raise ValueError(f"The continuation must have at least 1 token, got {self.tokens}.")


def parse_policies(text: str, sizes: Sequence[float] = ()) -> tuple[Policy, ...]:
    """Policies as written on the command line, separated by semicolons; the full cache is put first.

    Args:
      text: Policies; "all" stands for every method.
      sizes: Budgets for policies that need one and give none, as parts of the uncompressed cache's bytes, or of its
        tokens where a budget is what is read: each of these policies comes once per size.

    Raises:
      PolicyError: One cannot be read, makes no sense or is given twice.
    """
    given = [part.strip() for part in text.split(";") if part.strip()]
    parts = [name for part in given for name in (methods() if part == "all" else [part])]
    # Without a budget of its own a policy is another at every size; with one it is the same.
    wanted = sizes or (None,)
    policies = [policy for part in parts for policy in dict.fromkeys(_of_size(part, size) for size in wanted)]
    if not policies:
        raise PolicyError('No policies given. Write them like "full; snapkv(0.25); kivi(bits=4)".')
    for policy, other in itertools.combinations(policies, 2):
        if policy == other:
            raise PolicyError(f"{policy} and {other} are the same policy. Give it once.")
    return (Policy(), *(policy for policy in policies if policy != Policy()))


def _of_size(text: str, size: float | None) -> Policy:
    if size is None:
        return parse_policy(text)
    try:
        return parse_policy(text, budget=Budget(size=size))
    except PolicyError:
        return parse_policy(text, budget=Budget(ratio=size))


def resolved_config(name: str, dtype: Any, task: Task, settings: Settings) -> dict[str, Any]:
    """All that results depend on, for JSON; a run may go on where another of the same configuration stopped."""
    return {
        "model": name,
        "dtype": jnp.dtype(dtype).name,
        "task": task.resolved(),
        "policies": [str(policy) for policy in settings.policies],
        "protocol": protocol_of(task, settings),
        "continuation": settings.tokens,
        "speed": settings.speed,
    }


def protocol_of(task: Task, settings: Settings) -> str:
    """Perplexity and drift have no question: the context is compressed, and the text goes on."""
    return "agnostic" if task.metric in ("perplexity", "drift") else settings.protocol


# A sample under a protocol


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compressed, what comes after, and the room that this takes.

    Attributes:
      sample: Its origin.
      prompt: Compressed.
      question: Fed to the compressed cache; its last token asks for the answer.
      tokens: Length of the continuation along which predictions are compared.
    """

    sample: Sample
    prompt: Ids
    question: Ids
    tokens: int

    @property
    def longest(self) -> int:
        """Tokens after the prompt, at most."""
        return len(self.question) + max(self.tokens, self.sample.max_new_tokens, *map(len, self.sample.answers))

    @property
    def shape(self) -> tuple[int, int]:
        """What compilations depend on: the prompt's padded length, and the room for what comes after it."""
        written = -(-self.sample.max_new_tokens // PIECE) * PIECE
        return bucket(len(self.prompt)), bucket(max(self.longest, len(self.question) + written), ROOM)


def make_cases(task: Task, samples: Sequence[Sample], settings: Settings) -> list[Case]:
    """The samples under the protocol of the settings."""

    def case(sample: Sample) -> Case:
        context, question = sample.context_ids, sample.question_ids
        if protocol_of(task, settings) == "aware":
            early = len(question) - 1 if sample.early is None else sample.early
            context, question = context + question[:early], question[early:]
        return Case(sample, context, question, sample.max_new_tokens if task.metric == "drift" else settings.tokens)

    return [case(sample) for sample in samples]


def check(model: Model, cases: Sequence[Case], settings: Settings) -> None:
    """Everything that can be known before anything is computed.

    Raises:
      ValueError: A sample is longer than the model's context. PolicyError: A policy cannot serve the model or a prompt.
    """
    for case in cases:
        if len(case.prompt) + case.longest > model.config.max_length and not case.sample.endless:
            raise ValueError(
                f"Sample {case.sample.id} has {len(case.prompt)} tokens to compress and {case.longest} after them; the "
                f"model's context is {model.config.max_length}."
            )
    for length in sorted({len(case.prompt) for case in cases}):
        for policy in settings.policies:
            plan(policy, model.config, length, dtype_of(model))


def servable(
    model: Model, cases: Sequence[Case], policies: Sequence[Policy]
) -> tuple[tuple[Policy, ...], dict[Policy, str]]:
    """The policies that can serve the model and every prompt; and of the others why not."""
    reasons: dict[Policy, str] = {}
    for policy, length in itertools.product(policies, sorted({len(case.prompt) for case in cases})):
        try:
            plan(policy, model.config, length, dtype_of(model))
        except PolicyError as error:
            reasons[policy] = str(error)
    return tuple(policy for policy in policies if policy not in reasons), reasons


def dtype_of(model: Model) -> Any:
    """Of parameters, and of what a policy leaves as it is."""
    return model.params["embed"].dtype
