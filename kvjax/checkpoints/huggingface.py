"""Hugging Face folders: `config.json`, safetensors in one file or in shards, and a tokenizer if there is one.

    params, config, tokenizer = load("path/to/Llama-3.2-1B", dtype=jnp.bfloat16)

The files are memory-mapped. Names and shapes of all tensors are checked from the headers before any weight is read;
then `check.assemble` reads one tensor at a time.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from kvjax.checkpoints.check import CheckpointError, Tensor, assemble, check_names, parameter_names
from kvjax.checkpoints.tokenizer import Tokenizer, tokenizer_from_folder
from kvjax.models.config import Config
from kvjax.models.families import Weight, config_from_hf, token_ids, weight_table
from kvjax.models.params import abstract_params

DTYPES = {
    "F64",
    "F32",
    "F16",
    "BF16",
}  # Others (8 bits and fewer) need scales, and mean that the weights are quantized.


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file: its full name there, the file, and the file's open handle."""

    name: str
    path: pathlib.Path
    handle: Any

    @property
    def view(self) -> Any:
        """What the header says of it, and rows on demand."""
        return self.handle.get_slice(self.name)


def load(folder: str | pathlib.Path, dtype: Any = jnp.bfloat16) -> tuple[dict[str, Any], Config, Tokenizer | None]:
    """Loads a model.

    Args:
      folder: Holds `config.json` and `model.safetensors`, or `model.safetensors.index.json` and the shards it lists.
      dtype: Of the parameters, whatever the files store.

    Returns:
      Parameters (as in `kvjax.models.params`), config, and the tokenizer, None if the folder has no `tokenizer.json`.

    Raises:
      CheckpointError: A file is missing, truncated or malformed; the architecture is not supported; a tensor is
        missing, unexpected, of the wrong shape or dtype, or holds NaN or infinity.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    with contextlib.ExitStack() as stack:
        stored = _open(folder, stack)
        table = weight_table(config)
        _check_tied(stored, config, folder)
        check_names(expected=(weight.name for weight in table.values()), found=stored.keys(), source=str(folder))
        _check_shapes(stored, table, config)
        tensors = {
            name: Tensor(stored[weight.name].name, functools.partial(_read, stored[weight.name], weight))
            for name, weight in table.items()
        }
        params = assemble(config, tensors, str(folder), dtype)
    if not (folder / "tokenizer.json").is_file():
        return params, config, None
    tokenizer = tokenizer_from_folder(folder)
    # What goes in front of a text is the tokenizer's decision: Qwen names a BOS in its config and does not use it.
    return params, dataclasses.replace(config, bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids), tokenizer


def read_config(folder: str | pathlib.Path) -> Config:
    """The architecture of a folder, without its weights. `generation_config.json`, if there, has the last word on EOS.

    Raises:
      CheckpointError: A file is missing or malformed, or the architecture is not supported.
    """
    folder = pathlib.Path(folder)
    path, generation = folder / "config.json", folder / "generation_config.json"
    try:
        config = config_from_hf(_json(path), str(path))
        if generation.is_file():
            eos_ids = token_ids(_json(generation).get("eos_token_id"), f"{generation}: eos_token_id")
            config = dataclasses.replace(config, eos_ids=eos_ids or config.eos_ids)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return config


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Stored]:
    """Opens every file with weights; tensors by their name without the prefix of the model."""
    stored = {}
    for path, listed in _weight_files(folder).items():
        try:
            handle = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file: {error}. "
                "It may be a partial download; fetch it again."
            ) from error
        names = set(handle.keys())
        if missing := sorted(set(listed) - names):
            raise CheckpointError(
                f"{path} lacks {missing[0]}, which the index says it holds ({len(missing)} such tensors)."
            )
        stored |= {_plain_name(name): Stored(name, path, handle) for name in names if not _ignored(name)}
    return stored


def _weight_files(folder: pathlib.Path) -> dict[pathlib.Path, list[str]]:
    """Files with weights, and the tensors that the index, if there is one, says they hold."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: []}
    if not index.is_file():
        found = sorted(path.name for path in folder.iterdir())
        raise CheckpointError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json; it has {', '.join(found)}. "
            "PyTorch's .bin files are not read: save them as safetensors."
        )
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map, expected an object from tensor names to file names.")
    files: dict[pathlib.Path, list[str]] = {}
    for tensor, file in weight_map.items():
        files.setdefault(folder / file, []).append(tensor)
    if missing := sorted(path.name for path in files if not path.is_file()):
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing)}.")
    return files


def _plain_name(name: str) -> str:
    """The tensor's name within the language model."""
    for prefix in ("language_model.model.", "model.language_model.", "language_model.", "model."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _ignored(name: str) -> bool:
    """Tensors the language model does not need: the vision side of Gemma 3, and frequencies that old files store."""
    other = ("vision_tower.", "multi_modal_projector.")
    return name.removeprefix("model.").startswith(other) or name.endswith("rotary_emb.inv_freq")


def _check_tied(stored: dict[str, Stored], config: Config, folder: pathlib.Path) -> None:
    """Drops an output projection that repeats the tied embedding; refuses one that differs from it."""
    if config.tied and "lm_head.weight" in stored and "embed_tokens.weight" in stored:
        head, embedding = stored.pop("lm_head.weight"), stored["embed_tokens.weight"]
        if not np.array_equal(head.handle.get_tensor(head.name), embedding.handle.get_tensor(embedding.name)):
            raise CheckpointError(
                f"{folder}: tie_word_embeddings is true, but {head.name} differs from {embedding.name}; set it to "
                "false in config.json if the output projection is its own."
            )


def _check_shapes(stored: Mapping[str, Stored], table: Mapping[str, Weight], config: Config) -> None:
    """Compares every header with the architecture, in the layout of the file, before anything is read."""
    leaves = jax.tree.leaves(abstract_params(config))
    for name, leaf in zip(parameter_names(config), leaves, strict=True):
        weight, tensor = table[name], stored[table[name].name]
        expected = leaf.shape[::-1] if weight.transpose else leaf.shape
        expected = (sum(weight.parts), *expected[1:]) if weight.parts else expected
        found = tuple(tensor.view.get_shape())
        if found != expected:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} has shape {found}, expected {expected}{_fused(weight.parts)}."
            )
        if tensor.view.get_dtype() not in DTYPES:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name} is stored as {tensor.view.get_dtype()}, expected one of "
                f"{', '.join(sorted(DTYPES))}."
            )


def _fused(parts: Iterable[int]) -> str:
    return f" ({' + '.join(map(str, parts))} rows)" if parts else ""


def _read(tensor: Stored, weight: Weight) -> np.ndarray:
    """One parameter in our layout; of a fused tensor only its own rows are read."""
    start = sum(weight.parts[: weight.part])
    value = (
        tensor.view[start : start + weight.parts[weight.part]]
        if weight.parts
        else tensor.handle.get_tensor(tensor.name)
    )
    return value.T if weight.transpose else value


def _json(path: pathlib.Path) -> dict[str, Any]:
    """Parses a file that must hold a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except ValueError as error:  # Also text that is no UTF-8.
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value
