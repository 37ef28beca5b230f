"""Locret: a trained head says of every token, as it comes, what it will be worth. Huang et al., 2024,
https://arxiv.org/abs/2410.01805

A small MLP per layer, the retaining head, reads a token's queries, keys and values of all heads, before rotation, and
gives one number per KV head: the largest logit that the token will ever get (equation 2). Because that depends on
nothing else, a long prompt can be fed in chunks, and after each of them only the best tokens stay (algorithm 1). The
newest, the stabilizers, stay until the chunk after, and the last tokens of the prompt for good. The heads are trained
once per model with everything else frozen: see `kvjax.training.locret`. The house model, "tiny", comes with its own.

As in the authors' code: no stabilizers after the last chunk; the heads have no biases. Differs from the authors' code:
tokens keep their positions in the text (the code rotates keys anew by their place in the cache); a budget counts the
last `local` tokens too.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import Tokens
from kvjax.policies import Budget, Evict, Phase, Policy, PolicyError, register
from kvjax.policies.score import OfItself

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class RetainingHead:
    """`act([q, k, v] W1) W2` with a layer's own W1 [(H * G + 2 * H) * D, hidden] and W2 [hidden, H].

    They are `params["layers"][i]["trained"]["locret"]["w1"]` and `["w2"]`.

    Attributes:
      activation: The one that the heads were trained with: "silu", "gelu" or "relu".
    """

    activation: str = "silu"
    name = "locret"

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, got {self.activation!r}.")

    def __call__(self, new: Tokens) -> Array:
        """Scores of new tokens [B, H, T] float32.

        Raises:
          PolicyError: The parameters have no retaining heads, or those of another model.
        """
        weights = (new.trained or {}).get(self.name)
        if weights is None:
            raise PolicyError(
                "locret needs retaining heads, and these parameters have none: train them once per model with "
                "kvjax.training.locret.train_retaining_heads and add them with with_retaining_heads."
            )
        batch, _, length, _ = new.k.shape
        x = jnp.concatenate(
            [jnp.swapaxes(x, 1, 2).reshape(batch, length, -1) for x in (new.q_raw, new.k_raw, new.v)], -1
        )
        shape = x.shape[-1], new.k.shape[1]
        if (weights["w1"].shape[0], weights["w2"].shape[1]) != shape:
            raise PolicyError(
                f"These retaining heads read {weights['w1'].shape[0]} channels and rate {weights['w2'].shape[1]} KV "
                f"heads; this model has {shape[0]} and {shape[1]}. They belong to another model."
            )
        hidden = ACTIVATIONS[self.activation](x.astype(weights["w1"].dtype) @ weights["w1"])
        scores = jnp.einsum("bti,ih->bht", hidden, weights["w2"], preferred_element_type=jnp.float32)
        return scores.astype(jnp.float32)


@register(
    "Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads",
    "https://arxiv.org/abs/2410.01805",
    budget=0.25,
    small={"chunk": 4, "local": 2, "stabilizers": 3},
)
def locret(
    budget: Budget | int | float | str,
    *,
    chunk: int = 3072,
    local: int = 100,
    stabilizers: int | float = 2500,
    activation: str = "silu",
    phase: Literal["chunk", "prompt"] = "chunk",
) -> Policy:
    """Keeps the tokens that trained heads rate highest, chunk by chunk while the prompt is fed.

    Args:
      budget: Slots per layer and head, the local ones included (paper: 6,000, not counting these).
      chunk: Tokens of the prompt that are fed at once.
      local: Last tokens of the prompt, which always stay.
      stabilizers: Newest tokens that stay until the next chunk has come: a number, or a share of the budget.
      activation: The one that the heads were trained with.
      phase: "chunk" or, for one-shot compression of a prompt that has attended to all of itself, "prompt".
    """
    if isinstance(stabilizers, float) and not 0 <= stabilizers < 1:
        raise ValueError(f"stabilizers is a share below 1 or a number of tokens, got {stabilizers}.")
    if local < 0 or stabilizers < 0:
        raise ValueError(f"local and stabilizers cannot be negative, got {local} and {stabilizers}.")
    if phase not in ("chunk", "prompt"):
        raise ValueError(f'phase is "chunk" or "prompt", got {phase!r}: scores of tokens do not change while decoding.')
    score, slots = OfItself(RetainingHead(activation)), Budget.of(budget)
    if phase == "prompt":
        return Policy(stages=(Evict(score=score, budget=slots, recent=local),))
    return Policy(stages=(Evict(score=score, budget=slots, recent=stabilizers, phase=Phase("chunk", chunk, local)),))
