"""Several real processes on one machine: how they meet, and caches that they make, save, load and decode from together.

Whatever the number of processes and the mesh, the tokens are those of one device.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import kvjax
from kvjax.cache.host import on_host
from kvjax.checkpoints.orbax import load_cache
from kvjax.sharding import make_mesh
from kvjax.sharding.distributed import (
    DistributedError,
    _settings,
    batch_from_rows,
    everywhere,
    gather,
    initialize,
    local_rows,
    my_rows,
)
from kvjax.sharding.mesh import MeshError
from tests import quick, tiny
from tests.sharding.process import NEW

ROOT = Path(__file__).parents[2]
PATIENCE = 1200  # Seconds; how many they need depends on what has been compiled before, and on who else computes.
POLICIES = {
    "evicted_and_packed": "snapkv(0.5, window=4) | kivi(bits=4, group=16, residual=16)",
    "on_the_host": str(tiny.small("shadowkv")),
    "divided_by_the_data": str(tiny.small("cake")),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(count: int, command: list[str], environment: Callable[[int, int], dict[str, str]]) -> list[str]:
    """Runs a command in so many processes, with `environment(index, port)` for each; what each has printed."""
    for attempt in range(3):
        port = free_port()  # Somebody else may take it before our first process does: then another.
        processes = [
            subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=os.environ | quick.ENVIRONMENT | {"JAX_PLATFORMS": "cpu"} | environment(index, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(count)
        ]
        try:
            printed = [process.communicate(timeout=PATIENCE)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        if all(process.returncode == 0 for process in processes):
            return printed
        said = "\n".join(f"--- process {index}\n{text}" for index, text in enumerate(printed))
        if attempt == 2 or "address already in use" not in said.lower():
            pytest.fail(said)
    raise AssertionError


def run_job(count: int, scratch: Path, **job) -> dict[str, list[list[int]]]:
    """Tokens that follow from every policy's cache in a program of `count` processes; see `process.py`."""
    file, out = scratch / "job.json", scratch / "out.json"
    file.write_text(json.dumps({"policies": POLICIES, "out": str(out), **job}))

    def environment(index: int, port: int) -> dict[str, str]:
        return {
            "KVJAX_COORDINATOR": f"127.0.0.1:{port}",
            "KVJAX_PROCESS_COUNT": str(count),
            "KVJAX_PROCESS_INDEX": str(index),
        }

    together(count, ["-m", "tests.sharding.process", str(file)], environment)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone() -> dict[str, list[list[int]]]:
    """What one device answers."""
    found = {}
    for name, text in POLICIES.items():
        policy = kvjax.parse_policy(text)
        cache = kvjax.prefill(tiny.params(), tiny.CONFIG, policy, tiny.TOKENS, tiny.LENGTHS)
        found[name] = answer(cache)
    return found


def answer(cache) -> list[list[int]]:
    out, _ = kvjax.generate(
        tiny.params(), tiny.CONFIG, cache.policy, tiny.QUESTION, tiny.QUESTION_LENGTHS, cache=cache, max_new_tokens=NEW
    )
    return out.tolist()


@pytest.mark.slow
def test_caches_go_from_one_mesh_to_another(alone, tmp_path):
    """Two processes make and save them; four load them onto another mesh, and so does this one, onto one device."""
    folder = str(tmp_path / "caches")
    assert run_job(2, tmp_path, devices=2, mesh="data=2,model=2", folder=folder, load=False) == alone
    assert run_job(4, tmp_path, devices=2, mesh="data=2,seq=2,model=2", folder=folder, load=True) == alone
    for name in POLICIES:
        cache = load_cache(Path(folder) / name)
        assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(cache))
        assert any(map(on_host, jax.tree.leaves(cache))) == (name == "on_the_host")
        assert answer(cache) == alone[name]


# How processes meet

HELLO = """
from kvjax.sharding.distributed import initialize
initialize(timeout_seconds=120)
initialize()  # Once more changes nothing.
import jax
print("met", jax.process_index(), jax.process_count(), len(jax.devices()), flush=True)
"""


def slurm(index: int, port: int) -> dict[str, str]:
    names = {"JOB_ID": 7, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": index, "LOCALID": index}
    return {f"SLURM_{name}": str(value) for name, value in names.items()} | {"JAX_COORDINATOR_PORT": str(port)}


def open_mpi(index: int, port: int) -> dict[str, str]:
    names = {"WORLD_SIZE": 2, "WORLD_RANK": index, "WORLD_LOCAL_RANK": index}
    return {f"OMPI_COMM_{name}": str(value) for name, value in names.items()} | {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "JAX_COORDINATOR_PORT": str(port),
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_launchers_are_recognized(launcher):
    printed = together(2, ["-c", HELLO], launcher)
    assert [line for text in printed for line in text.splitlines() if "met" in line] == ["met 0 2 2", "met 1 2 2"]


def test_a_process_that_is_alone_needs_nothing():
    initialize()  # Devices have started: it does not matter.
    initialize("127.0.0.1:1", 1, 0)
    assert not jax.distributed.is_initialized()


def test_what_is_missing_is_said():
    assert _settings({}, None, None, None) is None
    assert _settings({"KVJAX_COORDINATOR": "a:1", "KVJAX_PROCESS_COUNT": "4"}, None, None, 3) == ("a:1", 4, 3)
    for arguments, words in [
        (("host:1", None, None), "KVJAX_PROCESS_COUNT and KVJAX_PROCESS_INDEX not given"),
        (("host", 2, 0), "KVJAX_COORDINATOR is 'host', expected host:port"),
        (("host:1", 2, 2), "Process 2 of 2: indices go from 0 to 1"),
    ]:
        with pytest.raises(DistributedError, match=words):
            _settings({}, *arguments)
    with pytest.raises(DistributedError, match="whole numbers, got 'two' and '0'"):
        _settings({"KVJAX_COORDINATOR": "a:1", "KVJAX_PROCESS_COUNT": "two", "KVJAX_PROCESS_INDEX": "0"}, *[None] * 3)
    with pytest.raises(DistributedError, match="has already started its devices"):
        initialize("127.0.0.1:1", 2, 0)


# Data in and out, in one process


def test_rows_go_in_and_come_out():
    mesh = make_mesh("data=4,model=2")
    rows = np.arange(24).reshape(8, 3)
    assert local_rows(8, mesh).tolist() == list(range(8))
    x = batch_from_rows(rows, mesh)
    assert x.sharding.spec == jax.P("data") and everywhere(rows, mesh).is_fully_replicated
    np.testing.assert_array_equal(my_rows(x), rows)
    np.testing.assert_array_equal(gather({"x": x})["x"], rows)
    with pytest.raises(MeshError, match="6 rows do not divide"):
        batch_from_rows(rows[:6], mesh)
    with pytest.raises(MeshError, match="A batch of 6 rows does not divide over data=4"):
        local_rows(6, mesh)
    across = jax.device_put(np.zeros((4, 4)), jax.sharding.NamedSharding(mesh, jax.P(None, "model")))
    with pytest.raises(MeshError, match="along other axes than its rows"):
        my_rows(across)
