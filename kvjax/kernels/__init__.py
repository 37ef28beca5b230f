"""Attention kernels: Pallas for TPUs and NVIDIA GPUs, blockwise JAX everywhere, dense references for tests."""

from kvjax.kernels.choose import Choice as Choice, KernelError as KernelError
from kvjax.kernels.decode import Tail as Tail, decode_attention as decode_attention
from kvjax.kernels.paged import PagedRequest as PagedRequest, paged_attention as paged_attention
from kvjax.kernels.parts import Part as Part, merge as merge, unfold as unfold
from kvjax.kernels.prefill import (
    ColumnSums as ColumnSums,
    Past as Past,
    Statistics as Statistics,
    prefill_attention as prefill_attention,
)
from kvjax.kernels.prefix import Prefixes as Prefixes, prefix_attention as prefix_attention
from kvjax.kernels.vectors import Vectors as Vectors
