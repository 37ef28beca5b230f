"""KIVI: keys per channel, values per token, 2 bits, no tuning. Liu et al., 2024, https://arxiv.org/abs/2402.02750

Outliers of keys sit in a few channels, so each channel gets its own scale over a group of tokens; values have none, so
a token's values share scales. The newest tokens stay in full precision (section 3.3, algorithm 1). Prefill attention is
exact.

As in the authors' code: keys are packed once `residual` of them are together, so between 0 and `residual - 1` of the
newest are in full precision; each value is packed once `residual` newer ones have come; zero is the group's minimum,
rounding is half to even. Differs from the authors' code: codes are found for the scale as it is stored (float16).
"""

from kvjax.policies import Grouped, Policy, register


@register(
    "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    "https://arxiv.org/abs/2402.02750",
    bits=2,
    small={"group": 16, "residual": 16},
)
def kivi(bits: int = 2, *, group: int = 32, residual: int = 128, scale_dtype: str = "float16") -> Policy:
    """Packs keys per channel and values per token to 2, 4 or 8 bits; the newest tokens stay in full precision.

    Args:
      bits: Width of a code.
      group: Tokens (keys) or channels (values) that share a scale and a zero (paper: 32).
      residual: Newest tokens in full precision (paper: 128; the code's example: 32).
      scale_dtype: Of scales and zeros.
    """
    return Policy(store=Grouped(bits, group, residual, scale_dtype))
