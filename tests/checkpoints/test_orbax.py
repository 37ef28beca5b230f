"""Orbax: what is saved comes back bit for bit, without a template; what is damaged or foreign is refused."""

import dataclasses
import gc
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import Cache
from kvjax.cache.slots import Slots
from kvjax.checkpoints import huggingface, orbax
from kvjax.checkpoints.check import CheckpointError
from kvjax.checkpoints.orbax import (
    abstract_pytree,
    is_orbax,
    load_cache,
    load_params,
    load_pytree,
    save_cache,
    save_params,
    save_pytree,
)
from kvjax.models import forward, init_params, stack_layers

# Where one leaf cannot be read, Orbax leaves the failed readers of the others behind: see `no_readers_left`.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DATA = Path(__file__).parents[1] / "data" / "families"
DTYPES = [
    "bfloat16",
    "float16",
    "float32",
    "float8_e4m3fn",
    "float8_e5m2",
    "int4",
    "int8",
    "uint8",
    "int32",
    "uint32",
    "bool",
]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Somebody's own policy."""

    value: int


def foreign_function(x):
    return x


def assert_same(tree, other) -> None:
    """Same structure (static fields included), dtypes and bits."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(autouse=True)
def no_readers_left():
    """Their complaints come when they are collected, which should be here, where they are expected."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def cache() -> Cache:
    """A cache with empty slots that hold NaN."""
    config = huggingface.read_config(DATA / "gemma3")
    k = jax.random.normal(jax.random.key(0), (2, 1, 5, 16), jnp.bfloat16).at[:, :, 3:].set(jnp.nan)
    pos = jnp.asarray([[[0, 1, 2, -1, -1]]] * 2)
    layers = (
        Slots(k=k, v=(k * 2).astype(jnp.float8_e4m3fn), pos=pos),
        Slots(k=k, v=k + 1, pos=pos, ring=True, bound=5),
    )
    return Cache(layers=layers, seen=jnp.asarray([3, 3]), config=config, policy=None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, tmp_path, rng):
    bits = rng.integers(0, 255, (3, 8), np.uint8)
    small = jnp.asarray(bits % 2 if dtype in ("bool", "int4") else bits).astype(dtype)
    tree = {"matrix": small, "scalar": small[0, 0], "empty": small[:0], "none": None}
    save_pytree(tmp_path / "x", tree)
    assert_same(load_pytree(tmp_path / "x"), tree)


def test_not_a_number_keeps_its_bits(tmp_path):
    bits = jnp.asarray([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001], jnp.uint32)
    tree = jax.lax.bitcast_convert_type(bits, jnp.float32)  # A NaN with a payload, -inf, -0, a subnormal.
    save_pytree(tmp_path / "x", tree)
    assert_same(load_pytree(tmp_path / "x"), tree)


def test_structures(tmp_path):
    tree = {
        "tuple": (jnp.arange(3), [np.arange(4, dtype=np.int32), ()], None),
        7: {"number": 0.1, "integer": 2**60, "flag": True, "text": "ä\n", "infinite": float("inf")},
        "dtype": jnp.dtype("bfloat16"),
        "function": forward,
        "key": jax.random.key(3),
    }
    save_pytree(tmp_path / "x", tree)
    loaded = load_pytree(tmp_path / "x")
    assert list(loaded) == list(tree) and loaded[7] == tree[7]
    assert loaded["dtype"] == jnp.bfloat16 and loaded["function"] is forward
    assert (jax.random.bits(loaded["key"]) == jax.random.bits(tree["key"])).all()
    assert_same(loaded["tuple"], jax.tree.map(jnp.asarray, tree["tuple"]))
    save_pytree(tmp_path / "no leaves", ("a", 1))
    assert load_pytree(tmp_path / "no leaves") == ("a", 1)


def test_cache(cache, tmp_path):
    save_cache(tmp_path / "cache", cache)
    assert is_orbax(tmp_path / "cache") and not is_orbax(tmp_path)
    loaded = load_cache(tmp_path / "cache")
    assert_same(loaded, cache)
    assert loaded.config == cache.config and loaded.layers[1].ring and hash(loaded.config) == hash(cache.config)


def test_params(tmp_path):
    config = huggingface.read_config(DATA / "gemma2")
    params = init_params(config, jax.random.key(0), jnp.bfloat16)
    save_params(tmp_path / "model", params, config)
    loaded, found, tokenizer = load_params(tmp_path / "model")
    assert found == config and tokenizer is None
    assert_same(loaded, params)
    save_params(tmp_path / "stacked", stack_layers(params, config), config)  # One layout on disk.
    assert_same(load_params(tmp_path / "stacked")[0], params)


def test_placement(tmp_path):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.P("x"))
    tree = {"a": jax.device_put(jnp.arange(8.0), split), "b": jnp.arange(3)}
    save_pytree(tmp_path / "x", tree)
    assert_same(load_pytree(tmp_path / "x"), tree)
    assert load_pytree(tmp_path / "x")["a"].devices() == {jax.devices()[0]}
    loaded = load_pytree(tmp_path / "x", placement=lambda name, leaf: split if name == "a" else leaf_on_last(leaf))
    assert_same(loaded, tree)
    assert loaded["a"].sharding == split and loaded["b"].devices() == {jax.devices()[-1]}


def leaf_on_last(leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    assert leaf.shape == (3,)
    return jax.sharding.SingleDeviceSharding(jax.devices()[-1])


def test_a_tree_of_shardings(cache, tmp_path):
    """What a folder holds is known without reading an array, and says where each one goes."""
    tree = {"cache": cache, "key": jax.random.key(1), "name": "a", "empty": jnp.zeros((0, 2))}
    save_pytree(tmp_path / "x", tree)
    shapes = abstract_pytree(tmp_path / "x")
    assert jax.tree.structure(shapes) == jax.tree.structure(tree) and shapes.pop("name") == tree.pop("name")
    for found, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(tree), strict=True):
        assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.P("x"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    rows = jax.tree.map(lambda leaf: split if getattr(leaf, "ndim", 0) > 1 else everywhere, shapes)
    loaded = load_pytree(tmp_path / "x", placement=rows)
    assert loaded["cache"].layers[1].k.sharding == split and loaded["cache"].seen.sharding == everywhere
    assert_same(loaded["cache"], cache)
    assert (jax.random.bits(loaded["key"]) == jax.random.bits(tree["key"])).all()
    with pytest.raises(CheckpointError, match=r"no sharding for leaf cache\.layers\.0\.k.*abstract_pytree"):
        load_pytree(tmp_path / "x", placement={"key": everywhere})


def test_parameters_by_their_tree(tmp_path):
    config = huggingface.read_config(DATA / "gemma2")
    params = init_params(config, jax.random.key(0), jnp.bfloat16)
    save_params(tmp_path / "model", params, config)
    last = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    loaded, *_ = load_params(tmp_path / "model", placement=jax.tree.map(lambda leaf: last, params))
    assert_same(loaded, params)
    assert all(leaf.devices() == {jax.devices()[-1]} for leaf in jax.tree.leaves(loaded))


def test_a_bucket_is_no_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(orbax._folder("gs://bucket/cache")) == "gs://bucket/cache"
    assert str(orbax._folder("cache")) == str(tmp_path / "cache")


def test_overwriting_is_asked_for(tmp_path):
    save_pytree(tmp_path / "x", 1)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_pytree(tmp_path / "x", 2)
    save_pytree(tmp_path / "x", 2, overwrite=True)
    assert load_pytree(tmp_path / "x") == 2


def test_what_cannot_be_found_again_is_refused_when_saved(tmp_path):
    for thing, words in [
        (Foreign(1), r"layers\.0 needs .*:Foreign.*extra="),
        (foreign_function, r"layers\.0 needs .*:foreign_function"),
        (lambda x: x, r"layers\.0 needs .*<lambda>"),
        (object(), r"layers\.0 is a builtins.object"),
        (np.float32(1), r"layers\.0 is a numpy.float32"),
        (np.arange(4.0), r"layers\.0 is float64, .* jax_enable_x64"),
    ]:
        with pytest.raises(TypeError, match=words):
            save_pytree(tmp_path / "x", {"layers": [thing]})
    with pytest.raises(TypeError, match="Two leaves are called 'a.b'"):
        save_pytree(tmp_path / "x", {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    assert not (tmp_path / "x").exists()


def test_extra(tmp_path):
    tree = {"policy": Foreign(3), "score": foreign_function}
    save_pytree(tmp_path / "x", tree, extra=(Foreign, foreign_function))
    assert load_pytree(tmp_path / "x", extra=(Foreign, foreign_function)) == tree
    with pytest.raises(CheckpointError, match="Foreign is not part of kvjax"):
        load_pytree(tmp_path / "x")


# --- Damage -----------------------------------------------------------------------------------------------------------


def edit_structure(folder: Path, edit) -> None:
    path = folder / "structure" / "metadata"
    structure = json.loads(path.read_text())
    edit(structure)
    path.write_text(json.dumps(structure))


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.fixture
def saved(tmp_path) -> Path:
    save_pytree(tmp_path / "x", {"weights": jax.random.normal(jax.random.key(0), (100, 100)), "more": jnp.ones(3)})
    return tmp_path / "x"


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="none is not a folder"):
        load_pytree(tmp_path / "none")
    with pytest.raises(CheckpointError, match="not a kvjax checkpoint"):
        load_pytree(tmp_path)


def test_flipped_bit(saved):
    path = largest_file(saved)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"leaf weights is corrupt|leaves missing or corrupt"):
        load_pytree(saved)


def test_truncated(saved):
    path = largest_file(saved)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"x: leaves missing or corrupt"):
        load_pytree(saved)


def test_missing_leaves(saved):
    edit_structure(saved, lambda structure: structure["tree"]["dict"].append(["new", {"leaf": "new"} | LEAF]))
    with pytest.raises(CheckpointError, match="leaves missing or corrupt"):
        load_pytree(saved)


LEAF = {"shape": [3], "dtype": "float32", "sums": [0, 0]}


def test_64_bits_are_not_cut(saved):
    wide = LEAF | {"dtype": "float64"}
    edit_structure(saved, lambda structure: structure["tree"]["dict"].append(["new", {"leaf": "new"} | wide]))
    with pytest.raises(CheckpointError, match="leaf new is float64: set jax_enable_x64"):
        load_pytree(saved)


def test_corrupt_structure(saved):
    (saved / "structure" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match="metadata is corrupt"):
        load_pytree(saved)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"class": "kvjax.cache.types:Gone", "fields": {}}, "Gone"),
        ({"class": "kvjax.cache.types:Cache", "fields": {"seen": 1, "gone": 2}}, "gone"),
        ({"class": "os:system", "fields": {}}, "os:system is not part of kvjax"),
        ({"class": "kvjax.checkpoints.orbax:os.system", "fields": {}}, "neither a dataclass nor a function"),
        ({"function": "kvjax.checkpoints.orbax:os.remove"}, "neither a dataclass nor a function"),
        ({"unknown": 1}, "unknown node"),
    ],
)
def test_incompatible(node, words, saved):
    """A folder of another version, or a hostile one, gets an explanation and nothing else."""
    edit_structure(saved, lambda structure: structure.update(tree=node))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_pytree(saved)
    assert "Saved with kvjax" in str(caught.value)


def test_another_format(saved):
    edit_structure(saved, lambda structure: structure.update(format=99))
    with pytest.raises(CheckpointError, match=r"has format 99 \(saved with kvjax .*reads format 2"):
        load_pytree(saved)


def test_not_a_model(saved):
    with pytest.raises(CheckpointError, match="does not hold a model"):
        load_params(saved)
    with pytest.raises(CheckpointError, match="does not hold a cache"):
        load_cache(saved)
