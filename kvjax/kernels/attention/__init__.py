"""Attention over a prompt and over a cache."""

from kvjax.kernels.attention.reference import (
    causal_attention as causal_attention,
)
from kvjax.kernels.attention.reference import (
    dot_keys as dot_keys,
)
from kvjax.kernels.attention.reference import (
    dot_values as dot_values,
)
from kvjax.kernels.attention.reference import fold as fold
from kvjax.kernels.attention.reference import masked_softmax as masked_softmax
from kvjax.kernels.attention.reference import unfold as unfold
from kvjax.kernels.attention.reference import visible as visible
