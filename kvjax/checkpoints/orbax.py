"""Saves and loads pytrees (parameters, caches, training state) with Orbax: bit-exact, and whole or not at all.

Example:
    save_cache("cache", cache)
    cache = load_cache("cache")  # No template: the folder says what it holds.
    cache = load_cache("cache", placement=cache_shardings(abstract_pytree("cache"), mesh))  # Onto any mesh.

A folder has two items. `leaves` are the arrays, by their path in the tree ("layers.3.k.words"). `structure` is JSON
that spells the tree around them: dicts, tuples, lists, kvjax's dataclasses by name with all fields, static ones too.
Nothing is pickled: only classes and functions of kvjax, and those a caller passes as `extra`, are ever looked up. Orbax
does not notice flipped bits, so `structure` has a checksum of every leaf.

With several processes all of them save and load, with the same arguments and a folder that all see. Each writes and
reads its own parts of arrays, the first process writes the structure. What each process has for itself (NumPy arrays,
arrays on its own devices alone) is written as the first has it.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import json
import os
import pathlib
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tokenizers
from etils import epath

from kvjax.cache.host import HOST, on_host
from kvjax.checkpoints.check import CheckpointError, check_params
from kvjax.checkpoints.checksum import checksums
from kvjax.checkpoints.tokenizer import Tokenizer
from kvjax.kernels.mesh import used
from kvjax.models.config import Config
from kvjax.models.params import layer_params
from kvjax.models.spread import param_specs

FORMAT = 2  # Raised when folders written before can no longer be read.

Path = str | os.PathLike[str]
Placement = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]  # See `load_pytree`.


# Parameters and caches


def save_params(
    path: Path, params: dict[str, Any], config: Config, tokenizer: Tokenizer | None = None, *, overwrite: bool = False
) -> None:
    """Saves a model, one dict of parameters per layer whichever layout `params` has; see `save_pytree`."""
    params = {**params, "layers": layer_params(params, config)}
    save_pytree(path, {"params": params, "config": config, "tokenizer": tokenizer}, overwrite=overwrite)


def load_params(path: Path, *, placement: Any = None) -> tuple[dict[str, Any], Config, Tokenizer | None]:
    """Loads what `save_params` saved, in the dtypes it was saved in; see `load_pytree`.

    A placement that is a tree is one of parameters: `param_shardings(abstract_pytree(path)["params"], config, mesh)`,
    which is also what it is under `jax.set_mesh(mesh)`.
    """
    mesh = jax.sharding.get_mesh()
    if placement is None and used(mesh):
        shapes = abstract_pytree(path)
        specs = param_specs(shapes["params"], shapes["config"], used(mesh))
        placement = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    tree = load_pytree(path, placement={"params": placement} if isinstance(placement, dict) else placement)
    if not (isinstance(tree, dict) and tree.keys() == {"params", "config", "tokenizer"}):
        raise CheckpointError(f"{path} does not hold a model but a {type(tree).__name__}; `save_params` writes models.")
    check_params(tree["config"], tree["params"], str(path))
    return tree["params"], tree["config"], tree["tokenizer"]


def save_cache(path: Path, cache: Any, *, overwrite: bool = False, extra: Iterable[Any] = ()) -> None:
    """Saves a cache with its config and policy; see `save_pytree`."""
    save_pytree(path, cache, overwrite=overwrite, extra=extra)


def load_cache(path: Path, *, placement: Any = None, extra: Iterable[Any] = ()) -> Any:
    """Loads what `save_cache` saved; see `load_pytree`.

    Its slots are as many as were saved. A mesh that does not divide them gets the cache whole where it does not, or
    evenly by `shard_cache` afterwards.
    """
    cache = load_pytree(path, placement=placement, extra=extra)
    if not dataclasses.is_dataclass(cache):
        raise CheckpointError(f"{path} does not hold a cache but a {type(cache).__name__}; `save_cache` writes caches.")
    return cache


# Any pytree


def save_pytree(path: Path, tree: Any, *, overwrite: bool = False, extra: Iterable[Any] = ()) -> None:
    """Saves a tree of arrays. The folder appears under its name only when everything has been written.

    Args:
      path: The folder to write, or a bucket's ("gs://bucket/folder", which needs the package gcsfs).
      tree: Arrays of any dtype in dicts, tuples, lists and kvjax's dataclasses; None, numbers, strings, dtypes and
        kvjax's functions between them.
      overwrite: Replace a folder that exists.
      extra: Dataclasses and functions outside kvjax that the tree may hold; loading needs the same ones.

    Raises:
      FileExistsError: The folder exists and `overwrite` is False.
      TypeError: The tree holds something else; the message says where.
    """
    folder = _folder(path)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; pass overwrite=True to replace it.")
    leaves: dict[str, Any] = {}
    node = _encode(tree, "", leaves, {_name(thing) for thing in extra})
    sums = checksums(leaves) if leaves else {}
    for described in _leaf_nodes(node):
        described["sums"] = sums[described["leaf"]]
    structure = {"format": FORMAT, "versions": _versions(), "tree": node}
    items: dict[str, Any] = {"structure": ocp.args.JsonSave(structure)}
    if leaves:  # Orbax refuses an empty tree.
        items["leaves"] = ocp.args.PyTreeSave({name: _writable(x) for name, x in leaves.items()})
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, ocp.args.Composite(**items), force=overwrite)


def load_pytree(path: Path, *, placement: Any = None, extra: Iterable[Any] = ()) -> Any:
    """Loads what `save_pytree` saved: the same tree, the same bits.

    Args:
      path: The folder.
      placement: Where leaves go, wherever they were saved from: a function (name, shape and dtype) -> sharding, or a
        tree of shardings like the saved one. Default: all on the first device, or in its host's memory where they were
        saved from there; with several processes a copy on every device.
      extra: Dataclasses and functions outside kvjax that the tree may hold.

    Raises:
      CheckpointError: The folder is missing, incomplete, corrupt, or was written by a kvjax that is too different; or
        the placement does not fit what it holds.
    """
    folder = _folder(path)
    structure = _read_structure(folder)
    # Leaves in a flat dict: they are restored and checked by name before anything is built of them.
    stored = {node["leaf"]: node for node in _leaf_nodes(structure["tree"])}
    place: Any = placement if callable(placement) else _by_name(placement, folder)
    return _build(folder, structure, _read_leaves(folder, stored, place), extra)


def abstract_pytree(path: Path, *, extra: Iterable[Any] = ()) -> Any:
    """What `load_pytree` would load, with `jax.ShapeDtypeStruct` in place of arrays, none of which is read.

    The sharding of each says which memory it was saved from, so that `cache_shardings` puts it there again.

    Raises:
      CheckpointError: As `load_pytree`.
    """
    folder = _folder(path)
    structure = _read_structure(folder)
    leaves = {node["leaf"]: _abstract(node) for node in _leaf_nodes(structure["tree"])}
    return _build(folder, structure, leaves, extra)


def _build(folder: epath.Path, structure: dict[str, Any], leaves: dict[str, Any], extra: Iterable[Any]) -> Any:
    try:
        return _decode(structure["tree"], leaves, {_name(thing): thing for thing in extra})
    except (KeyError, TypeError, ValueError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"{folder}: cannot be rebuilt: {error}. Saved with {structure['versions']}, loaded with {_versions()}."
        ) from error


def is_orbax(path: Path) -> bool:
    """Whether a path is a folder that `save_pytree` has written."""
    return _structure_file(_folder(path)).is_file()


def _folder(path: Path) -> epath.Path:
    """An absolute path of the file system, or a bucket's."""
    name = os.fspath(path)
    return epath.Path(name if "://" in name else pathlib.Path(name).absolute())


def _structure_file(folder: epath.Path) -> epath.Path:
    return folder / "structure" / "metadata"


def _read_structure(folder: epath.Path) -> dict[str, Any]:
    file = _structure_file(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected one that `save_pytree` has written.")
    if not file.is_file():
        raise CheckpointError(f"{folder} is not a kvjax checkpoint, or an incomplete one: {file} is missing.")
    try:
        structure = json.loads(file.read_text(encoding="utf-8"))
        found = structure["format"]
        if missing := {"tree", "versions"} - structure.keys():
            raise KeyError(*missing)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is corrupt: {error!r}. Copy the folder again.") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{folder} has format {found} (saved with {structure['versions']}); this kvjax reads format {FORMAT}."
        )
    return structure


def _read_leaves(folder: epath.Path, stored: dict[str, Any], place: Placement) -> dict[str, jax.Array]:
    if not stored:
        return {}
    if wide := [name for name, node in stored.items() if not _representable(jnp.dtype(node["dtype"]))]:
        raise CheckpointError(f"{folder}: leaf {wide[0]} is {stored[wide[0]]['dtype']}: set jax_enable_x64 to load it.")
    leaves = {name: _abstract(node) for name, node in stored.items()}
    wanted = {name: leaf.update(sharding=place(name, leaf)) for name, leaf in leaves.items()}
    try:
        restore = ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            values = checkpointer.restore(folder, ocp.args.Composite(leaves=restore))["leaves"]
    except Exception as error:  # Orbax and TensorStore raise bare Exceptions with pages of settings.
        reason = str(error).split(". See full", maxsplit=1)[0].split("\n", maxsplit=1)[0]
        raise CheckpointError(f"{folder}: leaves missing or corrupt: {reason}. Copy the folder again.") from error
    for name, sums in checksums(values).items():
        if sums != tuple(stored[name]["sums"]):
            raise CheckpointError(f"{folder}: leaf {name} is corrupt: its checksum differs. Copy the folder again.")
    # Orbax puts arrays where they belong, but the types of those in the host's memory say the device's.
    return {name: jax.device_put(x, HOST) if _in_host_memory(x) else x for name, x in values.items()}


def _abstract(node: dict[str, Any]) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf, and where it goes if nobody says anything else."""
    usual: jax.sharding.Sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if jax.process_count() > 1:
        everywhere = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
        usual = jax.sharding.NamedSharding(everywhere, jax.sharding.PartitionSpec())
    where = usual.with_memory_kind(node["memory"]) if "memory" in node else usual
    return jax.ShapeDtypeStruct(tuple(node["shape"]), jnp.dtype(node["dtype"]), sharding=where)


def _by_name(shardings: Any, folder: epath.Path) -> Placement:
    """The placement that a tree of shardings means; that of leaves themselves for None."""
    table = {
        jax.tree_util.keystr(path, simple=True, separator="."): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
    }

    def place(name: str, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        if shardings is None:
            assert leaf.sharding is not None
            return leaf.sharding
        if not isinstance(table.get(name), jax.sharding.Sharding):
            raise CheckpointError(
                f"{folder}: the placement has no sharding for leaf {name}. It has to be a tree like the saved one; "
                "`abstract_pytree` gives that tree."
            )
        return table[name]

    return place


def _in_host_memory(x: jax.Array) -> bool:
    return x.sharding.memory_kind == "pinned_host"


def _leaf_nodes(node: Any) -> Iterator[dict[str, Any]]:
    """Every description of a leaf in a structure."""
    if isinstance(node, dict) and "leaf" in node:
        yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _leaf_nodes(child)


# Trees as JSON. None, bool, int, float and str stand for themselves; all else is an object with one telling key.


def _encode(x: Any, path: str, leaves: dict[str, Any], extra: set[str]) -> Any:
    """The JSON of a tree; its arrays are added to `leaves` by name."""

    def child(value: Any, name: Any) -> Any:
        return _encode(value, f"{path}.{name}" if path else str(name), leaves, extra)

    if x is None or type(x) in (bool, int, float, str):
        return x
    if isinstance(x, jax.Array | np.ndarray):
        return _encode_array(x, path or "leaf", leaves)
    if type(x) in (tuple, list):
        return {type(x).__name__: [child(value, i) for i, value in enumerate(x)]}
    if type(x) is dict and all(type(key) in (str, int) for key in x):
        return {"dict": [[key, child(value, key)] for key, value in x.items()]}
    if isinstance(inspect.unwrap(x) if callable(x) else x, types.FunctionType):  # Jitted ones too.
        return {"function": _allowed(x, path, extra)}
    if isinstance(x, np.dtype):
        return {"dtype": x.name}
    if isinstance(x, tokenizers.Tokenizer):
        return {"tokenizer": x.to_str()}
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = {f.name: child(getattr(x, f.name), f.name) for f in dataclasses.fields(x) if f.init}
        return {"class": _allowed(type(x), path, extra), "fields": fields}
    raise TypeError(f"{path or 'the tree'} is a {type(x).__module__}.{type(x).__qualname__}, which cannot be saved.")


def _encode_array(x: Any, name: str, leaves: dict[str, Any]) -> dict[str, Any]:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return {"random_key": str(jax.random.key_impl(x)), "data": _encode_array(jax.random.key_data(x), name, leaves)}
    if not _representable(x.dtype):
        raise TypeError(f"{name} is {x.dtype}, which JAX turns into 32 bits: cast it, or set jax_enable_x64.")
    described = {"shape": list(x.shape), "dtype": x.dtype.name}
    if x.size == 0:  # Orbax refuses these.
        return {"empty": described}
    if name in leaves:
        raise TypeError(f"Two leaves are called {name!r}: dict keys with dots in them are ambiguous; rename one.")
    leaves[name] = x
    memory = {"memory": x.sharding.memory_kind} if on_host(x) else {}  # Where it goes again when it is loaded.
    return {"leaf": name, **described, **memory}


def _writable(x: Any) -> Any:
    """Orbax refuses arrays of one process among several, unless they are NumPy's."""
    alone = jax.process_count() > 1 and isinstance(x, jax.Array) and x.is_fully_addressable
    return np.asarray(x) if alone else x


def _decode(node: Any, leaves: dict[str, jax.Array], extra: dict[str, Any]) -> Any:
    """The tree that `_encode` made `node` of."""

    def child(value: Any) -> Any:
        return _decode(value, leaves, extra)

    match node:
        case None | bool() | int() | float() | str():
            return node
        case {"leaf": name}:
            return leaves[name]
        case {"empty": {"shape": shape, "dtype": dtype}}:
            return jnp.zeros(shape, jnp.dtype(dtype))
        case {"random_key": implementation, "data": data}:
            wrap, found = functools.partial(jax.random.wrap_key_data, impl=implementation), child(data)
            return wrap(found) if isinstance(found, jax.Array) else jax.eval_shape(wrap, found)
        case {"tuple": children}:
            return tuple(child(value) for value in children)
        case {"list": children}:
            return [child(value) for value in children]
        case {"dict": items}:
            return {key: child(value) for key, value in items}
        case {"class": name, "fields": fields}:
            return _resolve(name, extra)(**{key: child(value) for key, value in fields.items()})
        case {"function": name}:
            return _resolve(name, extra)
        case {"dtype": name}:
            return jnp.dtype(name)
        case {"tokenizer": text}:
            return tokenizers.Tokenizer.from_str(text)
    raise ValueError(f"unknown node {str(node)[:80]}")


def _name(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


def _allowed(thing: Any, path: str, extra: set[str]) -> str:
    """The name under which a class or function can be found again.

    Raises:
      TypeError: It cannot be: it is neither kvjax's nor in `extra`, or it has no name of its own.
    """
    name = _name(thing)
    ours = name.startswith(("kvjax.", "kvjax:")) and "<" not in name  # "<lambda>", "<locals>".
    if not ours and name not in extra:
        raise TypeError(
            f"{path or 'the tree'} needs {name}, which is not a module-level name of kvjax and cannot be found again; "
            "pass it as `extra=(...,)` to both saving and loading."
        )
    return name


def _resolve(name: str, extra: dict[str, Any]) -> Any:
    if name in extra:
        return extra[name]
    module, _, qualname = name.partition(":")
    if module.split(".")[0] != "kvjax":
        raise ValueError(f"{name} is not part of kvjax; pass it as `extra=(...,)`")
    thing: Any = importlib.import_module(module)
    for part in qualname.split("."):
        thing = getattr(thing, part)
    # A structure may name nothing but what saving writes: no modules, no other callables.
    function = callable(thing) and isinstance(inspect.unwrap(thing), types.FunctionType)
    if not (function or dataclasses.is_dataclass(thing)) or _name(thing) != name:
        raise ValueError(f"{name} is neither a dataclass nor a function of kvjax")
    return thing


def _representable(dtype: Any) -> bool:
    """Whether JAX holds this dtype as it is: 64 bits only in x64 mode."""
    return jax.dtypes.canonicalize_dtype(dtype) == dtype


def _versions() -> str:
    """For messages, for example "kvjax 0.1.0, jax 0.10.2, orbax-checkpoint 0.12.8"."""

    def version(package: str) -> str:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:  # Run from a checkout.
            return f"{package} of unknown version"

    return ", ".join(version(package) for package in ("kvjax", "jax", "orbax-checkpoint"))
