"""What all kernels for NVIDIA Hopper GPUs share."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

PROCESSORS = 132  # Of an H100 or H200.
SHARED_MEMORY = 228 << 10  # Bytes of each,
RESERVED = 4 << 10  # of which every program takes so many for itself.


def interpreter(**options: Any) -> Any:
    """Parameters of Pallas' interpreter.

    Raises:
      NotImplementedError: This JAX' interpreter cannot read transposed tiles.
    """
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(
            f"The GPU kernel can be interpreted from JAX 0.11 on, not by {jax.__version__}: use implementation='xla'."
        )
    return getattr(plgpu, "InterpretGPUParams")(**options)  # noqa: B009
