"""Attention of a prompt over itself."""

from kvjax.kernels.prefill.reference import BLOCK as BLOCK, causal_attention as causal_attention
