"""A loaded model: parameters, config and tokenizer, with the functions of `kvjax.generation` at hand.

Everything here turns what people have (text, lists of ids, ragged batches) into arrays, checks it before anything is
computed, and calls the functional twins.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache import Cache
from kvjax.checkpoints import load_checkpoint
from kvjax.checkpoints.tokenizer import Tokenizer
from kvjax.generation import Sampler, extend, generate, observe, prefill, stream
from kvjax.models.config import Config
from kvjax.policies import Needs, Observed, Policy, as_policy

Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | np.ndarray | Array
BUCKET = (
    64  # Prompts are padded to multiples of this (of an eighth of their length, if that is more): fewer compilations.
)


def bucket(length: int, least: int = BUCKET) -> int:
    """The padded length of a prompt: a multiple of `least`, and of an eighth of its length's power of two."""
    step = max(least, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def load(name_or_path: str, dtype: Any = None) -> "Model":
    """Loads a model: "tiny" (comes with kvjax) or "gemma3-270m" (a package), a folder in Hugging Face's or Orbax's
    layout, a .gguf file or a hub name.

    Args:
      name_or_path: What to load.
      dtype: Of parameters and cache; default float32 on CPUs (faster there than bfloat16), bfloat16 elsewhere.

    Under `jax.set_mesh(kvjax.sharding.make_mesh("seq=4,model=2"))` parameters are placed on the mesh, and what the
    model does there is spread over it.

    Raises:
      CheckpointError: It cannot be found or read; the message names the file, the tensor, what was expected and what
        was found.
    """
    return Model(*load_checkpoint(name_or_path, dtype))


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is ready to use.

    Attributes:
      params: Nested dict of arrays, see `models.params`.
      config: Its architecture.
      tokenizer: None where the checkpoint has none; then prompts are token ids.
    """

    params: dict[str, Any]
    config: Config
    tokenizer: Tokenizer | None = None

    def encode(self, prompt: Prompt, *, start: bool = True) -> tuple[Array, Array]:
        """Token ids [B, T] int32, right-padded to a bucket, and lengths [B] int32.

        Args:
          prompt: Text, token ids, or a list of either.
          start: Whether text begins a sequence (gets the beginning-of-sequence token).

        Raises:
          ValueError: Empty, too long for the model, ids out of range, or text without a tokenizer.
        """
        rows = self._rows(prompt, start)
        longest = max((len(row) for row in rows), default=0)
        if not rows or min(len(row) for row in rows) == 0:
            raise ValueError("The prompt is empty: give at least one token.")
        for row in rows:
            wrong = next((token for token in row if not 0 <= token < self.config.vocab_size), None)
            if wrong is not None:
                raise ValueError(
                    f"Token id {wrong} is out of range: this model's ids are 0 to {self.config.vocab_size - 1}."
                )
        if longest > self.config.max_length:
            raise ValueError(f"The prompt has {longest} tokens; this model's context is {self.config.max_length}.")
        padded = np.zeros((len(rows), min(bucket(longest), self.config.max_length)), np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return jnp.asarray(padded), jnp.asarray([len(row) for row in rows], jnp.int32)

    def _rows(self, prompt: Prompt, start: bool) -> list[list[int]]:
        if isinstance(prompt, str):
            return [self._text(prompt, start)]
        if isinstance(prompt, np.ndarray | jax.Array):
            if not np.issubdtype(prompt.dtype, np.integer):
                raise ValueError(f"Token ids are integers, got {prompt.dtype}.")
            prompt = np.atleast_2d(np.asarray(prompt)).tolist()
        items: list[Any] = list(prompt)
        if items and all(isinstance(item, int | np.integer) for item in items):
            return [[int(item) for item in items]]
        return [self._text(item, start) if isinstance(item, str) else [int(token) for token in item] for item in items]

    def _text(self, text: str, start: bool) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("This checkpoint has no tokenizer: give token ids instead of text.")
        if not text:
            raise ValueError("The prompt is empty: give at least one token.")
        return self.tokenizer.encode(text, add_bos=start)

    def prefill(self, prompt: Prompt, policy: Policy | str | None = None, *, chunk: int | None = None) -> Cache:
        """The compressed cache of a prompt (or of a batch of them). See `kvjax.prefill`."""
        tokens, lengths = self.encode(prompt)
        return prefill(self.params, self.config, as_policy(policy), tokens, lengths, chunk)

    def observe(self, prompt: Prompt, needs: Needs = Needs()) -> Observed:  # noqa: B008
        """Everything that policies can ask of a prompt: one prefill for many of them. See `kvjax.observe`."""
        tokens, lengths = self.encode(prompt)
        return observe(self.params, self.config, tokens, lengths, needs)

    def extend(self, cache: Cache, prompt: Prompt) -> tuple[Array, Cache]:
        """Feeds more text or tokens to a cache: logits [B, T, vocab] float32 of the new tokens, and the new cache.

        Raises:
          ValueError: As `encode`, or the batch differs from the cache's, or the model's context ends.
        """
        tokens, lengths = self._continue(cache, prompt, 0)
        logits, cache = extend(self.params, self.config, cache.policy, cache, tokens, lengths)
        return logits[:, : int(lengths.max())], cache

    def _continue(self, cache: Cache, prompt: Prompt, more: int) -> tuple[Array, Array]:
        tokens, lengths = self.encode(prompt, start=False)
        if tokens.shape[0] != cache.batch_size:
            raise ValueError(f"{tokens.shape[0]} prompts on a cache of {cache.batch_size} sequences.")
        self._check_context(cache.policy, int((cache.seen + lengths).max()), more)
        return tokens, lengths

    def _check_context(self, policy: Policy, length: int, more: int) -> None:
        if not policy.endless and length + more > self.config.max_length:
            raise ValueError(
                f"{length} tokens and {more} new ones exceed this model's context of {self.config.max_length} tokens."
            )

    def generate(
        self,
        prompt: Prompt,
        *,
        policy: Policy | str | None = None,
        cache: Cache | None = None,
        max_new_tokens: int = 64,
        sampler: Sampler = Sampler(),  # noqa: B008
        key: Array | None = None,
        stop: Sequence[int] | None = None,
    ) -> Any:
        """Continues a prompt, or answers a question on a cache.

        Args:
          prompt: Text, token ids, or a list of either.
          policy: For the prompt. A cache knows its own.
          cache: What came before; it stays usable for the next question.
          max_new_tokens: At most so many.
          sampler: Greedy by default. key: A `jax.random` key, needed for a temperature above 0.
          stop: Token ids that end the answer; default: the model's end-of-sequence tokens.

        Returns:
          Text for text, a list of ids for ids; a list of them for a batch. Without the stop token.
        """
        if cache is not None and policy is not None:
            raise ValueError("A cache knows the policy that made it; give one of cache and policy.")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        if cache is None:
            tokens, lengths = self.encode(prompt)
            self._check_context(as_policy(policy), int(lengths.max()), max_new_tokens)
        else:
            tokens, lengths = self._continue(cache, prompt, max_new_tokens)
        ends = tuple(self.config.eos_ids if stop is None else stop)
        out, count = generate(
            self.params,
            self.config,
            as_policy(policy) if cache is None else cache.policy,
            tokens,
            lengths,
            cache=cache,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            key=key,
            stop=ends,
        )
        rows = [row[:n] for row, n in zip(out.tolist(), count.tolist(), strict=True)]
        rows = [row[:-1] if row and row[-1] in ends else row for row in rows]
        single, text = _is_single(prompt), _is_text(prompt)
        answers: list[Any] = [self._decode(row) if text else row for row in rows]
        return answers[0] if single else answers

    def stream(
        self,
        prompt: Prompt,
        *,
        policy: Policy | str | None = None,
        cache: Cache | None = None,
        max_new_tokens: int = 64,
        sampler: Sampler = Sampler(),  # noqa: B008
        key: Array | None = None,
    ) -> Iterator[int]:
        """Token ids of `generate` for one prompt as they come, without the stop token."""
        chosen = as_policy(policy) if cache is None else cache.policy
        if cache is None:
            tokens, lengths = self.encode(prompt)
            self._check_context(chosen, int(lengths.max()), max_new_tokens)
        else:
            tokens, lengths = self._continue(cache, prompt, max_new_tokens)
        ids = stream(
            self.params,
            self.config,
            chosen,
            tokens,
            lengths,
            cache=cache,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            key=key,
            stop=self.config.eos_ids,
        )
        return (token for token in ids if token not in self.config.eos_ids)

    def _decode(self, ids: Sequence[int]) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.decode(ids)


def _is_single(prompt: Prompt) -> bool:
    if isinstance(prompt, str):
        return True
    if isinstance(prompt, np.ndarray | jax.Array):
        return prompt.ndim == 1
    return isinstance(prompt[0], int | np.integer)


def _is_text(prompt: Prompt) -> bool:
    return isinstance(prompt, str) or (not isinstance(prompt, np.ndarray | jax.Array) and isinstance(prompt[0], str))
