"""Attention kernels: Pallas for TPUs and NVIDIA GPUs, blockwise JAX everywhere, dense references for tests."""

from kvjax.kernels.choose import Choice as Choice, KernelError as KernelError
from kvjax.kernels.decode import Tail as Tail, decode_attention as decode_attention
from kvjax.kernels.parts import Part as Part, merge as merge, unfold as unfold
from kvjax.kernels.vectors import Vectors as Vectors
