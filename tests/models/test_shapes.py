"""Shapes of real models: as many parameters as published, to the last one; and they come with an installed kvjax."""

import json
import math
import tomllib
from pathlib import Path

import jax
import pytest

from kvjax.models import shapes
from kvjax.models.params import AXES, abstract_params, axis_sizes, layer_names
from kvjax.models.shapes import model_config, model_names

ROOT = Path(__file__).parents[2]
# Totals of the published safetensors files. Those of Gemma 3 hold a vision tower besides, the same for all sizes, and
# its projection to the language model.
PUBLISHED = {
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b-v0.3": 7_248_023_552,
    "phi3-mini-4k": 3_821_079_552,
    "phi3-mini-128k": 3_821_079_552,
    "gemma3-4b": 4_300_079_472,
    "gemma3-12b": 12_187_325_040,
    "gemma3-27b": 27_432_406_640,
}
VISION_WIDTH, VISION_TOWER = 1152, 416_866_032


def count(config) -> int:
    """Parameters of a model, by the table that declares them."""
    sizes, top = axis_sizes(config), ["embed", "final_norm"] + ([] if config.tied else ["lm_head"])
    return sum(math.prod(sizes[axis] for axis in AXES[name]) for name in top + config.num_layers * layer_names(config))


def vision(config) -> int:
    return VISION_TOWER + VISION_WIDTH * config.hidden_size + VISION_WIDTH if config.family == "gemma3" else 0


def test_every_file_is_known():
    assert set(model_names()) == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    config = model_config(name)
    assert count(config) + vision(config) == PUBLISHED[name]


def test_the_count_is_that_of_the_parameters():
    config = model_config("phi3-mini-4k")
    assert count(config) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def test_what_caches_depend_on():
    """Bytes of an uncompressed bfloat16 cache per token, from the heads and layers that the papers state."""
    for name, per_token in [("llama3.1-8b", 131_072), ("llama3.1-70b", 327_680), ("llama3.1-405b", 516_096)]:
        config = model_config(name)
        assert 2 * 2 * len(config.full_layers) * config.num_kv_heads * config.head_dim == per_token
    gemma = model_config("gemma3-27b")
    assert (len(gemma.full_layers), gemma.num_layers, gemma.sliding_window) == (10, 62, 1024)
    assert gemma.query_scale == 168**-0.5 and gemma.rope.factor == 8 and gemma.sliding_rope.theta == 10_000
    phi = model_config("phi3-mini-128k")
    assert len(phi.full_layers) == 32 and len(phi.rope.long_factor) == len(phi.rope.short_factor) == 48
    assert model_config("phi3-mini-4k").full_layers == ()
    assert model_config("mistral-7b-v0.3").full_layers == tuple(range(32))  # Since v0.2 without a window.


def test_files_and_folders(tmp_path):
    settings = json.loads((ROOT / "tests" / "data" / "families" / "qwen3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert "1e-05" in (tmp_path / "config.json").read_text()  # Which YAML 1.1 takes for a string.
    assert model_config(tmp_path) == model_config(str(tmp_path / "config.json"))
    (tmp_path / "mine.yaml").write_text((shapes._folder() / "qwen3-8b.yaml").read_text())
    assert model_config(tmp_path / "mine.yaml") == model_config("qwen3-8b")


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"'Llama-3.2-8B' is known. Did you mean llama3.1-8b.*Known are gemma3-12b"):
        model_config("Llama-3.2-8B")
    with pytest.raises(ValueError, match="Cannot read .*none.yaml: No such file"):
        model_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="bad.yaml cannot be parsed"):
        model_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="list.yaml holds a list"):
        model_config(tmp_path / "list.yaml")
    (tmp_path / "short.yaml").write_text("model_type: llama")
    with pytest.raises(ValueError, match="short.yaml: hidden_size is missing"):
        model_config(tmp_path / "short.yaml")


def test_an_installed_package_has_them():
    """The wheel puts the folder where `shapes` looks first."""
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    (source, target), *others = included["force-include"].items()
    assert not others and list((ROOT / source).glob("*.yaml"))
    assert ROOT / target == shapes._PACKAGE / "configs" / "models"


def test_a_name_is_known_however_it_is_spelled():
    assert model_config("Llama-3.1-8B") == model_config("llama-3.1-8b") == model_config("llama3.1-8b")
