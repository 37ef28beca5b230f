"""What methods have trained for a model travels in a file beside it."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from kvjax.checkpoints import CheckpointError, load_checkpoint, save_trained
from kvjax.training.locret import init_retaining_heads, with_retaining_heads

FOLDER = Path(__file__).parents[1] / "data" / "families" / "llama2"


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(FOLDER, tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_with_heads_loads_with_them(folder):
    plain, config, _ = load_checkpoint(folder, jnp.float32)
    heads = init_retaining_heads(config, jax.random.key(0), hidden=4)
    path = save_trained(folder, with_retaining_heads(plain, config, heads), config)
    assert path == folder / "trained.safetensors" and path.stat().st_size < 2 * sum(
        x.nbytes for x in jax.tree.leaves(heads)
    )
    params, _, _ = load_checkpoint(folder, jnp.float32)
    for layer, head in zip(params["layers"], heads, strict=True):
        for name, value in head.items():
            found = layer["trained"]["locret"][name]
            assert found.dtype == jnp.float32
            np.testing.assert_array_equal(found, value.astype(jnp.bfloat16).astype(jnp.float32))
    without = jax.tree.structure(
        {**params, "layers": tuple({k: v for k, v in x.items() if k != "trained"} for x in params["layers"])}
    )
    assert without == jax.tree.structure(plain)


@pytest.mark.parametrize(
    "name, message",
    [
        ("layers.99.trained.locret.w1", "of another model; this one has"),
        ("layers.0.q_proj", "not of the form"),
        ("layers.x.trained.locret.w1", "not of the form"),
    ],
)
def test_another_models_file_is_refused(folder, name, message):
    save_file({name: jnp.ones(2)}, folder / "trained.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_a_corrupt_file_is_named(folder):
    (folder / "trained.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="trained.safetensors is corrupt"):
        load_checkpoint(folder)


def test_there_must_be_something_to_save(folder):
    params, config, _ = load_checkpoint(folder)
    with pytest.raises(ValueError, match="No method has trained anything"):
        save_trained(folder, params, config)
