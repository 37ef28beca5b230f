"""Plain rounding of single tokens: what every quantization method has to beat at the same bytes.

Each token's key and value are rounded by themselves when they are written, so these stores go with every policy, also
with those that evict while decoding.
"""

from kvjax.cache import Packed, Scaled
from kvjax.policies import Policy, Slotwise, register


@register("LLM.int8-style absmax rounding", "https://arxiv.org/abs/2208.07339")
def int8() -> Policy:
    """8-bit integers with one scale per token and head (largest magnitude / 127)."""
    return Policy(store=Slotwise(Scaled("int8")))


@register("FlexGen: group-wise round-to-nearest", "https://arxiv.org/abs/2303.06865", small={"group": 16})
def int4(*, group: int = 64, scale_dtype: str = "float16") -> Policy:
    """4-bit integers, asymmetric, with a scale and a zero per token and group of channels.

    Args:
      group: Channels that share a scale and a zero (FlexGen: 64); 0 for a whole head.
      scale_dtype: Of scales and zeros.
    """
    return Policy(store=Slotwise(Packed(4, group, scale_dtype)))


@register("FlexGen: group-wise round-to-nearest", "https://arxiv.org/abs/2303.06865", small={"group": 16})
def int2(*, group: int = 32, scale_dtype: str = "float16") -> Policy:
    """2-bit integers, as int4: the plain rounding that KIVI has to beat.

    Args:
      group: Channels that share a scale and a zero; 0 for a whole head.
      scale_dtype: Of scales and zeros.
    """
    return Policy(store=Slotwise(Packed(2, group, scale_dtype)))


@register("FP8 Formats for Deep Learning", "https://arxiv.org/abs/2209.05433")
def fp8(*, dtype: str = "float8_e4m3fn") -> Policy:
    """8-bit floating point (e4m3) with one scale per token and head (largest magnitude / 448).

    Args:
      dtype: "float8_e4m3fn", or "float8_e5m2" (wider range, coarser).
    """
    if dtype not in ("float8_e4m3fn", "float8_e5m2"):
        raise ValueError(f'dtype must be "float8_e4m3fn" or "float8_e5m2", got {dtype!r}.')
    return Policy(store=Slotwise(Scaled(dtype)))
