"""Attention over a prompt and over a cache."""

from kvjax.kernels.attention.reference import (
    BLOCK as BLOCK,
    causal_attention as causal_attention,
    dot_keys as dot_keys,
    dot_values as dot_values,
    fold as fold,
    masked_softmax as masked_softmax,
    unfold as unfold,
    visible as visible,
)
