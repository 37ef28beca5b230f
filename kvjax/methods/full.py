"""The full cache: every token stays, in full precision. The ceiling of every table."""

from kvjax.policies import Policy, register


@register("Uncompressed cache", "https://arxiv.org/abs/1706.03762")
def full() -> Policy:
    """Everything stays; the reference for quality and bytes."""
    return Policy()
