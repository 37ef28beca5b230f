"""What a decoder-only transformer is, as data: one frozen `Config`, and how each family's Hugging Face settings map to
it.

Supported families: Llama 2 / 3 / 3.1 / 3.2, Mistral, Qwen2 / 2.5, Qwen3, Gemma 2, Gemma 3 (text), Phi-3. A family is a
function from its `config.json` to a `Config`; the forward pass never asks for the family's name.
"""

import dataclasses
from typing import Literal

from kvjax.kernels.choose import Implementation

LayerType = Literal["full", "sliding"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864) with the scalings in use.

    Attributes:
      theta: Base of the frequencies.
      rotary_dim: Leading channels of a head that rotate (half-rotation layout); the rest pass through.
      scaling: `none`, `linear` (positions divided by `factor`), `llama3` (Llama 3.1), `yarn` (arXiv 2309.00071) or
        `longrope` (arXiv 2402.13753).
      factor: Context extension factor.
      original_length: Context length before the extension, in tokens.
      low_freq_factor, high_freq_factor: Wavelength bounds of `llama3`, as divisors of `original_length`.
      beta_fast, beta_slow: Rotations within `original_length` that bound yarn's ramp.
      truncate: Whether yarn rounds the bounds of its ramp to whole channels.
      attention_factor: Multiplier of cos and sin (yarn, longrope); a float, already resolved.
      short_factor, long_factor: Per-frequency divisors of `longrope`, for sequences up to and beyond `original_length`.
      stride: Only every so many-th frequency is used.
      repeat: The frequencies come so many times, one after another.
    """

    theta: float
    rotary_dim: int
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    stride: int = 1
    repeat: int = 1


@dataclasses.dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): what all heads know of a token is one vector.

    In the absorbed form it is attention with a single key of `rope_dim + rank` channels, of which the first `rope_dim`
    rotate and the last `rank`, the latent, are the value too.

    Attributes:
      rank: Channels of the latent.
      rope_dim: Channels that carry the position: a divisor or a multiple of the embedding's `rotary_dim`.
    """

    rank: int
    rope_dim: int

    def fits(self, rope: Rope) -> bool:
        """Whether `rope_dim` goes with an embedding."""
        mine, theirs = self.rope_dim, rope.rotary_dim
        return mine > 0 and mine % 2 == 0 and (theirs % mine == 0 or mine % theirs == 0)

    def rope(self, rope: Rope) -> Rope:
        """The embedding of the rotating channels: fewer of a head's frequencies, or those of several heads."""
        return dataclasses.replace(
            rope,
            stride=max(rope.rotary_dim // self.rope_dim, 1),
            repeat=max(self.rope_dim // rope.rotary_dim, 1),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture of a decoder-only transformer. Hashable, so it can be a static argument of `jit`.

    Attributes:
      family: Name for humans ("llama", "gemma3", ...).
      vocab_size, hidden_size, mlp_size: Widths.
      num_heads, num_kv_heads, head_dim: Query heads, key/value heads (grouped-query attention), channels per head.
      layer_types: One of "full" or "sliding" per layer; its length is the depth.
      sliding_window: A sliding layer's query at position i sees keys j with `i - j < sliding_window`. 0 if unused.
      rope: Rotary embedding of full layers.
      sliding_rope: Rotary embedding of sliding layers.
      max_length: The model's context, in tokens.
      norm_eps: RMSNorm epsilon.
      norm_offset: Added to RMSNorm weights (1 in Gemma, whose weights are stored around zero).
      activation: Of the gated MLP.
      qkv_bias, qk_norm, post_norms: Biases on q, k, v; RMSNorm on q and k heads before rotation; RMSNorm on the output
        of attention and MLP before the residual sum (Gemma).
      query_scale: Multiplier of attention logits, usually `head_dim ** -0.5`.
      attn_softcap, logit_softcap: `cap * tanh(x / cap)` on attention logits and on output logits; 0 for none.
      embed_scale: Multiplier of token embeddings (`sqrt(hidden_size)` in Gemma).
      tied: Whether the output projection is the embedding.
      mla: Latent attention in place of grouped queries; `num_kv_heads` and `head_dim` then still say what the model was
        converted from (see `kvjax.convert`). None for grouped queries.
      kernels: Which implementation attends to a cache, as `kvjax.kernels.decode_attention` names them; no part of the
        architecture, and "auto" unless one wants to compare.
      bos_id, eos_ids: Special tokens, as the checkpoint's config or tokenizer says; `bos_id` -1 for none.
    """

    family: str
    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_types: tuple[LayerType, ...]
    rope: Rope
    sliding_rope: Rope
    sliding_window: int = 0
    max_length: int = 4096
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    query_scale: float = 1.0
    attn_softcap: float = 0.0
    logit_softcap: float = 0.0
    embed_scale: float = 1.0
    tied: bool = False
    mla: Mla | None = None
    kernels: Implementation = "auto"
    bos_id: int = -1
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}).")
        if "sliding" in self.layer_types and self.sliding_window <= 0:
            raise ValueError("A model with sliding layers needs sliding_window > 0.")
        if self.mla and not all(self.mla.fits(rope) for rope in (self.rope, self.sliding_rope)):
            raise ValueError(
                f"{self.mla}: rope_dim must be even, and a divisor or a multiple of the {self.rope.rotary_dim} "
                "channels that rotate in a head."
            )

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the full-attention layers: those that policies compress."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "full")

    @property
    def cache_heads(self) -> int:
        """KV heads that a cache holds."""
        return 1 if self.mla else self.num_kv_heads

    @property
    def key_dim(self) -> int:
        """Channels of a key in a cache."""
        return self.mla.rope_dim + self.mla.rank if self.mla else self.head_dim

    @property
    def value_dim(self) -> int:
        """Channels of a value in a cache; with latent attention they are the last of the key."""
        return self.mla.rank if self.mla else self.head_dim

    def layer_rope(self, layer: int) -> Rope:
        rope = self.rope if self.layer_types[layer] == "full" else self.sliding_rope
        return self.mla.rope(rope) if self.mla else rope
