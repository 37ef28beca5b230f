"""ShadowKV: keys are low-rank before rotation, and values can wait on the host. Sun et al., 2024,
https://arxiv.org/abs/2410.21465

At the end of the prompt all keys before rotation become two factors of `rank` and all values go to the host's memory;
the device keeps the mean rotated key of every chunk, its landmark. A step takes the softmax of its query over the
landmarks, rebuilds and rotates the keys of the best chunks, fetches their values, and attends to them beside what is
kept exactly: the chunks that their landmark describes worst, the end of the prompt, and everything generated
(algorithms 1 and 2). Prefill attention is exact. Bytes on the device: `kvjax.cache.memory_nbytes(cache)`.

As in the authors' code: outliers are found by the smallest cosine of a key with its chunk's mean; the shares of a
query group are joined by their maximum; generated tokens are never compressed. Differs from the authors' code:
landmarks' logits have the model's own scale, which for their head_dim of 128 is their constant 1 / sqrt(128)
(`landmark_scale` sets it); each of several new tokens chooses its own chunks, where they take one choice for all;
rows of a batch may differ in length; a prompt too short for local and outlier chunks is kept exactly, where they need
4,096 tokens; values of outlier chunks, which are on the device, are not on the host as well.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax.cache.low_rank import far_and_near
from kvjax.kernels import mesh
from kvjax.policies import Budget, Needs, Policy, register
from kvjax.policies.budget import whole
from kvjax.policies.observe import Prompt
from kvjax.policies.store import Built, Store


@dataclasses.dataclass(frozen=True)
class Shadow(Store):
    """Low-rank keys and landmarks on the device, values on the host.

    Attributes:
      sparse: Tokens that a step reads of what is not exact, in whole chunks; a ratio is of the prompt.
      rank, chunk, local, outliers, host_gather: See `shadowkv`.
      landmark_scale: Of the landmarks' logits; 0 for the model's own.
    """

    sparse: Budget
    rank: int = 160
    chunk: int = 8
    local: int = 4
    outliers: int = 48
    landmark_scale: float = 0.0
    host_gather: bool = True
    needs = Needs(raw_keys=True)

    def __post_init__(self):
        for name, least in (("rank", 1), ("chunk", 1), ("local", 0), ("outliers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.sparse.in_bytes:
            raise ValueError(f"sparse is what a step reads, in tokens or as a ratio of the prompt; got {self.sparse}.")
        if self.sparse.tokens is not None and self.sparse.tokens < self.chunk:
            raise ValueError(
                f"sparse={self.sparse} is less than a chunk of {self.chunk} tokens: nothing would be read."
            )

    def reads(self, length: Any) -> Any:
        """Chunks that a step reads after prompts of `length` tokens, at least one."""
        return jnp.maximum(whole(self.sparse.mean(length)) // self.chunk, 1)

    def build(self, prompt: Prompt, about: Built) -> Any:
        assert prompt.k_raw is not None
        longest, reads = prompt.k.shape[2], self.reads(about.obs.length)
        # The decomposition is of all heads and tokens together: on a mesh every device makes it.
        arrays = mesh.gathered((prompt.k, prompt.v, prompt.k_raw, prompt.pos))
        with mesh.alone():
            return far_and_near(
                *arrays,
                rank=self.rank,
                size=self.chunk,
                local=self.local,
                outliers=self.outliers,
                reads=reads,
                most=max(int(whole(self.sparse.mean(longest))) // self.chunk, 1),
                length=about.obs.length,
                scale=self.landmark_scale,
                host_gather=self.host_gather,
            )

    def check(self, config: Any) -> None:
        if config.mla is not None:
            raise ValueError("the keys of latent attention are of low rank already, and shared by all heads")


@register(
    "ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference",
    "https://arxiv.org/abs/2410.21465",
    small={"chunk": 4, "sparse": 12, "rank": 4, "local": 2, "outliers": 1},
)
def shadowkv(
    sparse: Budget | int | float | str = 2048,
    *,
    rank: int = 160,
    chunk: int = 8,
    local: int = 4,
    outliers: int = 48,
    landmark_scale: float = 0.0,
    host_gather: bool = True,
) -> Policy:
    """Keeps low-rank keys and chunk landmarks on the device and values on the host; a step rebuilds what it reads.

    Args:
      sparse: Tokens that a step reads of the prompt, beside those that are exact (paper: 2,048, 1.56 % of 128k).
      rank: Of the keys of all heads together, before rotation.
      chunk: Tokens that share a landmark.
      local: Chunks at the end of the prompt that stay exact.
      outliers: Chunks per head that stay exact because their landmark describes them worst.
      landmark_scale: Multiplier of the landmarks' logits; 0 for the model's.
      host_gather: Whether the host gathers the values that a step reads, so that only these cross the link; False moves
        a layer's values whole, for backends that cannot compute on their host.
    """
    store = Shadow(Budget.of(sparse), rank, chunk, local, outliers, landmark_scale, host_gather)
    return Policy(store=store)
