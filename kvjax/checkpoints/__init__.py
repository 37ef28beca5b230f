"""Real weights in (Hugging Face folders, GGUF files, packaged models, Orbax) and out (Orbax).

Example:
    params, config, tokenizer = load_checkpoint("gemma3-270m")
"""

import difflib
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.checkpoints import gguf, huggingface
from kvjax.checkpoints.check import CheckpointError as CheckpointError
from kvjax.checkpoints.packaged import BUNDLED, PACKAGES, packaged_gguf
from kvjax.checkpoints.tokenizer import Tokenizer as Tokenizer
from kvjax.checkpoints.trained import save_trained as save_trained, with_trained
from kvjax.models.config import Config


def load_checkpoint(
    name_or_path: str | os.PathLike[str], dtype: Any = None
) -> tuple[dict[str, Any], Config, Tokenizer | None]:
    """Loads a model from wherever it is.

    Args:
      name_or_path: A packaged model ("tiny", "gemma3-270m"), a GGUF file, a Hugging Face folder (config.json and
        safetensors), a folder that `orbax.save_params` wrote, or a name on the Hugging Face Hub ("Qwen/Qwen3-0.6B").
      dtype: Of the parameters. Default: as saved for Orbax folders; else float32 on CPUs, which compute slowly in
        bfloat16, and bfloat16 on accelerators.

    Returns:
      Parameters (as in `kvjax.models.params`), config, and the tokenizer, None if the checkpoint has none.

    Raises:
      CheckpointError: There is no such name or path, the package that holds the model is not installed, the checkpoint
        is corrupt, or its model is not supported.
    """
    name, path = os.fspath(name_or_path), pathlib.Path(name_or_path).expanduser()
    packaged = name in BUNDLED or name in PACKAGES
    if path.is_file() or (path.is_dir() and not (packaged and _holds_no_model(path))):
        return _load_path(path, dtype)
    if name in BUNDLED:
        return _load_folder(BUNDLED[name], dtype)
    if name in PACKAGES:
        return gguf.load(packaged_gguf(name), _or_default(dtype))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.suffix == ".gguf":
        return _load_folder(_download(name), dtype)
    raise CheckpointError(_unknown(name, path))


def default_dtype() -> Any:
    """float32 on CPUs, bfloat16 on accelerators."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _or_default(dtype: Any) -> Any:
    return default_dtype() if dtype is None else dtype


def _load_folder(folder: pathlib.Path, dtype: Any) -> tuple[dict[str, Any], Config, Tokenizer | None]:
    """A Hugging Face folder, with what methods have trained for its model if it holds that too."""
    params, config, tokenizer = huggingface.load(folder, _or_default(dtype))
    return with_trained(params, config, folder), config, tokenizer


def _holds_no_model(folder: pathlib.Path) -> bool:
    """A folder of something else that happens to have a packaged model's name, such as its figures."""
    return not any([*folder.glob("config.json"), *folder.glob("structure"), *folder.glob("*.gguf")])


def _load_path(path: pathlib.Path, dtype: Any) -> tuple[dict[str, Any], Config, Tokenizer | None]:
    if path.is_file():
        if gguf.is_gguf(path):
            return gguf.load(path, _or_default(dtype))
        raise CheckpointError(f"{path} is not a GGUF file; of a safetensors file give the folder it is in.")

    from kvjax.checkpoints import orbax  # Here: it takes a third of a second to import, and few models need it.

    if orbax.is_orbax(path):
        params, config, tokenizer = orbax.load_params(path)
        cast = params if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return cast, config, tokenizer
    if (path / "config.json").is_file():
        return _load_folder(path, dtype)
    if files := sorted(path.glob("*.gguf")):
        raise CheckpointError(f"{path} is a folder with GGUF files; name one, for example {files[0]}.")
    raise CheckpointError(
        f"{path} is a folder of no known kind: it has no config.json (Hugging Face) and no structure/metadata (Orbax)."
    )


def _download(name: str) -> pathlib.Path:
    """The local copy of a model on the Hugging Face Hub, fetched if need be."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"There is no folder {name}, and to look for it on the Hugging Face Hub, huggingface_hub is needed: "
            '`pip install "kvjax[hub]"`.'
        ) from error
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # Offline, unknown, gated: the library has many errors, all worth the same advice.
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise CheckpointError(
            f"There is no folder {name}, and the Hugging Face Hub did not give a model of that name ({reason}). Check "
            "the name, the network and, for gated models, your token; or give the path of a folder or GGUF file."
        ) from error


def _unknown(name: str, path: pathlib.Path) -> str:
    """What to say of a name that is nothing."""
    siblings = [str(path.parent / other) for other in os.listdir(path.parent)] if path.parent.is_dir() else []
    near = difflib.get_close_matches(name, [*BUNDLED, *PACKAGES, *siblings], cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    packaged = ", ".join([*BUNDLED, *PACKAGES])
    return (
        f"There is no model {name!r}.{hint} Give a packaged model ({packaged}), a .gguf file, a Hugging Face or Orbax "
        "folder, or a Hub name (org/name)."
    )
