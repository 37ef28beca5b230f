"""kvjax as a model of EleutherAI's lm-evaluation-harness: its tasks, asked of compressed caches.

    python -m kvjax.lm_eval --model kvjax --model_args pretrained=tiny,policy="snapkv(0.25)" --tasks my_task

What follows `python -m kvjax.lm_eval` is what the harness's own command takes. Harnesses that find models by entry
points (newer than 0.4.13) know this one by themselves, as `lm_eval --model kvjax ...`.

Every context but its last token is compressed by the policy, as in the question-aware protocol of `kvjax compare`; the
last token is fed to the compressed cache, and so is the continuation. No prediction comes from the full cache, unless
there is but one token before it. Contexts that repeat, as those of multiple choice do, are seen once.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import lm_eval.models as _known  # noqa: F401  # Before our own: a registry that is not empty counts as filled.
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from kvjax.cache import Cache
from kvjax.evaluation.caches import alike, compressed, see, sizes
from kvjax.evaluation.cases import dtype_of
from kvjax.evaluation.score import likelihood
from kvjax.generation import Sampler, decode, extend_hidden, with_room
from kvjax.model import Model, load
from kvjax.models.transformer import unembed
from kvjax.policies import Policy, PolicyError, as_policy, parse_policy, plan

PIECE = 16  # Tokens written between two looks for a text that ends the answer.
FULL = Policy()

log = logging.getLogger("lm_eval.kvjax")
T = TypeVar("T")


class Request(Protocol):
    """What is read of the harness's instances."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class KVJax(TemplateLM):
    """A model under a policy, as the harness wants it.

    Attributes of `--model_args`:
      pretrained: What `kvjax.load` takes.
      policy: As on kvjax's command line, such as `snapkv(0.25)`; quote it, shells read brackets.
      whole_below: Contexts of fewer tokens keep their full cache. 0: all are compressed, and a policy that needs longer
        ones is refused before anything is computed.
      block: Tokens of a rolling text that are predicted from one compressed cache.
      max_length: Tokens of context and answer; default: the model's. Contexts lose their beginning where they are
        longer, as with the harness's own models.
      dtype: Of parameters and cache, see `kvjax.load`.
      batch_size: Contexts at once.
      device, max_batch_size: Taken and not heeded: the harness always names a CUDA device, JAX uses what there is.
    """

    def __init__(
        self,
        pretrained: str | Model,
        policy: str | Policy = "full",
        *,
        whole_below: int = 0,
        block: int = 256,
        max_length: int | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(
                f"batch_size must be a positive number, got {batch_size!r}; kvjax does not search for one."
            )
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}.")
        self.policy = parse_policy(policy) if isinstance(policy, str) else as_policy(policy)
        self.model = pretrained if isinstance(pretrained, Model) else load(pretrained, dtype)
        if self.model.tokenizer is None:
            raise ValueError(f"{pretrained} has no tokenizer, and the harness asks in text.")
        self.whole_below, self.block, self.batch_size = whole_below, block, int(batch_size)
        self.max_length = self.model.config.max_length if max_length is None else max_length
        if not 2 <= self.max_length <= self.model.config.max_length:
            raise ValueError(f"max_length must be from 2 to the model's {self.model.config.max_length}.")
        self.bytes, self.full_bytes = 0, 0

    # What the harness wants to know

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eos_ids[0] if self._tokens.eos_ids else self._tokens.bos_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that has no context."""
        return self._tokens.bos_id if self._tokens.bos_id >= 0 else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return f"kvjax-{self._tokens.vocab_size}"

    @property
    def _tokens(self) -> Any:
        return self.model.tokenizer

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a beginning-of-sequence token goes first, unless it is there already or is not wanted."""
        ids = self._tokens.encode(string, add_bos=False)
        bos = [self._tokens.bos_id] if self._tokens.bos_id >= 0 and add_special_tokens is not False else []
        return ids if ids[:1] == bos else bos + ids

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the harness's results: the policy, and how much smaller caches were, by their bytes."""
        measured = self.full_bytes / self.bytes if self.bytes else None
        return {"kv_cache_policy": str(self.policy), "kv_cache_compression": measured}

    # What it asks

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of (_, context, continuation): the continuation's log-likelihood, and whether it is the greedy one."""
        pairs = [(self._fitting(context, len(after)), tuple(after)) for _, context, after in requests]
        asked: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for context, after in dict.fromkeys(pairs):
            asked.setdefault(context, []).append(after)
        found: dict[tuple[Any, Any], tuple[float, bool]] = {}
        contexts = list(asked)
        for rows, caches in self._seen(contexts, "loglikelihood", disable_tqdm):
            # One continuation of every context at a time; the caches stay as they are.
            for afters in itertools.zip_longest(*(asked[contexts[i]] for i in rows), fillvalue=()):
                for i, after, x in zip(rows, afters, caches.follow(afters), strict=True):
                    if after:
                        score = likelihood(self.model, x, after)
                        found[contexts[i], after] = score.log, score.greedy
        return [found[pair] for pair in pairs]

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: `block` tokens after another, each predicted from all that fits before it, compressed."""
        documents = [self._blocks(self.tok_encode(text, add_special_tokens=False)) for text, *_ in _args(requests)]
        scored = iter(self._loglikelihood_tokens(list(itertools.chain(*documents)), disable_tqdm=disable_tqdm))
        return [sum(next(scored)[0] for _ in blocks) for blocks in documents]

    def _blocks(self, ids: list[int]) -> list[tuple[None, list[int], list[int]]]:
        text = [self.prefix_token_id, *ids]
        starts = range(0, len(ids), self.block)
        return [(None, text[: start + 1], text[start + 1 :][: self.block]) for start in starts]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Greedy or drawn answers, to the first of the texts that end them."""
        asked: dict[str, list[int]] = {}  # Requests by their options.
        given: list[tuple[str, dict[str, Any]]]
        given = [(context, dict(normalize_gen_kwargs(options))) for context, options in _args(requests)]
        for i, (_, options) in enumerate(given):
            asked.setdefault(repr(sorted(options.items())), []).append(i)
        answers = [""] * len(requests)
        for group in asked.values():
            options = given[group[0]][1]
            contexts = [self._fitting(self.tok_encode(given[i][0]), options["max_gen_toks"]) for i in group]
            until, sampler = [text for text in options["until"] if text], _sampler(options)
            for rows, caches in self._seen(contexts, "generate_until", disable_tqdm):
                for i, text in zip(rows, caches.write(options["max_gen_toks"], until, sampler), strict=True):
                    answers[group[i]] = text
        return answers

    # How it is answered

    def _fitting(self, context: Sequence[int], after: int) -> tuple[int, ...]:
        """The end of a context that leaves room for what comes after."""
        most = self.max_length - after + 1
        if most < 1:
            raise ValueError(f"An answer of {after} tokens exceeds max_length={self.max_length}.")
        if len(context) > most:
            log.warning("A context of %d tokens loses its first %d.", len(context), len(context) - most)
        return tuple(context[-most:])

    def _seen(
        self, contexts: Sequence[tuple[int, ...]], what: str, quiet: bool
    ) -> Iterator[tuple[list[int], "Caches"]]:
        """Batches of contexts of about one length, the longest first: which they are, and their caches."""

        def policy_of(context: tuple[int, ...]) -> Policy:
            return FULL if len(context) < max(self.whole_below, 2) else self.policy

        def together(i: int) -> tuple[Policy, bool, int]:
            policy, length = policy_of(contexts[i]), len(contexts[i])
            # A single token leaves nothing to compress, and is predicted from by itself.
            return policy, length > 1, alike(policy, length - 1)

        self._check([len(context) - 1 for context in contexts if policy_of(context) == self.policy])
        ordered = sorted(range(len(contexts)), key=lambda i: (-len(contexts[i]), contexts[i]))
        with tqdm(total=len(ordered), desc=f"kvjax {what} ({self.policy})", disable=quiet) as progress:
            for (policy, *_), group in itertools.groupby(ordered, key=together):
                for rows in _chunks(list(group), self.batch_size):
                    caches = read(self.model, policy, [contexts[i] for i in rows])
                    self.bytes, self.full_bytes = self.bytes + caches.nbytes, self.full_bytes + caches.full_nbytes
                    yield rows, caches
                    progress.update(len(rows))

    def _check(self, lengths: Sequence[int]) -> None:
        """Whether the policy can serve all of them, before anything is computed."""
        for length in sorted(set(lengths)):
            try:
                plan(self.policy, self.model.config, length, dtype_of(self.model))
            except PolicyError as error:
                raise PolicyError(
                    f"{error} Contexts of this task have {min(lengths) + 1} to {max(lengths) + 1} tokens. With "
                    "whole_below=N among --model_args, those of fewer than N tokens keep their full cache."
                ) from None


@dataclasses.dataclass(frozen=True)
class Caches:
    """A batch of contexts, seen and compressed.

    Attributes:
      model: Whose they are.
      cache: Of B sequences, compressed, without what is in `late`; stays usable.
      late: Tokens [B] that come after compression, or None where contexts have but one.
      last: Final hidden state [B, hidden] of the last token that the cache has seen.
      nbytes: What the caches take for these lengths alone. full_nbytes: In full, as bfloat16.
    """

    model: Model
    cache: Cache
    late: tuple[int, ...] | None
    last: np.ndarray
    nbytes: int
    full_nbytes: int

    def _feed(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, Cache]:
        """Hidden states [B, T, hidden] of fed tokens, and the cache that has seen them."""
        width = max(PIECE, 1 << (max(map(len, rows)) - 1).bit_length())  # Powers of two: few sizes are compiled.
        tokens, valid = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], valid[i, : len(row)] = row, True
        cache = with_room(self.cache, width)
        params, config, policy = self.model.params, self.model.config, cache.policy
        x, cache = extend_hidden(params, config, policy, cache, jnp.asarray(tokens), jnp.asarray(valid))
        return np.asarray(x), cache

    def follow(self, continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Hidden states [tokens, hidden] from which each token of a row's continuation is predicted."""
        late = [()] * len(continuations) if self.late is None else [(token,) for token in self.late]
        x, _ = self._feed([(*first, *after[:-1]) for first, after in zip(late, continuations, strict=True)])
        if self.late is None:
            x = np.concatenate([self.last[:, None], x], 1)
        return [states[: len(after)] for states, after in zip(x, continuations, strict=True)]

    def write(self, limit: int, until: Sequence[str], sampler: Sampler) -> list[str]:
        """Answers of at most `limit` tokens, to the first of the texts that end them."""
        last, cache = self.last, self.cache
        if self.late is not None:
            x, cache = self._feed([(token,) for token in self.late])
            last = x[:, 0]
        params, config, rows = self.model.params, self.model.config, range(len(last))
        assert self.model.tokenizer is not None
        ends = tuple(dict.fromkeys((*config.eos_ids, *self.model.tokenizer.eos_ids)))
        logits, cache = _next_logits(params, config, jnp.asarray(last)), with_room(cache, -(-limit // PIECE) * PIECE)
        cache = jax.tree.map(jnp.copy, cache)  # Decoding takes it away.
        done, written, texts = jnp.zeros(len(last), bool), [[] for _ in rows], [""] * len(last)
        for _ in range(0, limit, PIECE):
            tokens, count, logits, done, cache = decode(
                params,
                config,
                cache.policy,
                cache,
                logits,
                jax.random.key(np.random.randint(2**31)),  # The harness seeds NumPy.
                done,
                sampler=sampler,
                max_new_tokens=PIECE,
                stop=ends,
            )
            for i in rows:
                written[i] = (written[i] + tokens[i, : int(count[i])].tolist())[:limit]
                texts[i] = self.model.tokenizer.decode([token for token in written[i] if token not in ends])
            ended = [any(text in texts[i] for text in until) for i in rows]
            done = done | jnp.asarray(ended)
            if bool(done.all()):
                break
        return [text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))] for text in texts]


def read(model: Model, policy: Policy, contexts: Sequence[tuple[int, ...]]) -> Caches:
    """Reads a batch of contexts and compresses all but the last token of each.

    Args:
      contexts: Token ids; all of one token, or all of more.
    """
    late = tuple(context[-1] for context in contexts) if len(contexts[0]) > 1 else None
    rows = [context if late is None else context[:-1] for context in contexts]
    observed = None if policy.in_chunks else see(model, rows, [policy])
    last = np.zeros(()) if observed is None else np.asarray(observed.last)
    plans, cache = compressed(model, observed, rows, policy)
    nbytes, _ = sizes(plans, model.config, dtype_of(model))
    return Caches(model, cache, late, last, nbytes, cache.full_nbytes)


_next_logits = jax.jit(unembed, static_argnames="config")


def _sampler(options: Any) -> Sampler:
    return Sampler(
        temperature=float(options.get("temperature", 0.0)),
        top_k=max(int(options.get("top_k", 0)), 0),
        top_p=float(options.get("top_p", 1.0)),
        min_p=float(options.get("min_p", 0.0)),
    )


def _args(requests: Sequence[Request]) -> list[tuple[Any, ...]]:
    return [request.args for request in requests]


def _chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    return (list(items[i : i + size]) for i in range(0, len(items), size))


if "kvjax" not in model_registry:
    model_registry.register("kvjax", target=KVJax)


def main() -> None:
    """The harness's own command, with this model registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
