"""Attention over a prompt and over a cache."""

from kvjax.kernels.attention.reference import (
    BLOCK as BLOCK,
    NEG as NEG,
    Part as Part,
    attend_part as attend_part,
    causal_attention as causal_attention,
    dot_keys as dot_keys,
    dot_values as dot_values,
    fold as fold,
    masked_softmax as masked_softmax,
    merge as merge,
    part_weights as part_weights,
    unfold as unfold,
    visible as visible,
)
