"""Programs compiled quickly rather than well: most that tests compile are run once, on tiny shapes."""

import os

import jax

# XLA's older emitters, which JAX 0.11 has no longer, compile in half the time.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
FLAGS += ["--xla_cpu_use_fusion_emitters=false"] if jax.__version_info__ < (0, 11) else []
# For a process that starts: XLA reads its flags once, before it first compiles.
ENVIRONMENT = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip(),
}
