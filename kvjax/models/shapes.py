"""The shapes of well-known models, without their weights: for plans, compilations ahead of time and memory estimates.

Example:
    config = model_config("llama3.1-70b")
    params = abstract_params(config, jnp.bfloat16)  # Shapes alone: 70.6 billion parameters that take no memory.

Each is a YAML file in `configs/models` with the settings of the model's published `config.json`, so that shapes and
checkpoints are read by the same code, `families.config_from_hf`.
"""

import difflib
import functools
import json
import os
import pathlib

import yaml

from kvjax.models.config import Config
from kvjax.models.families import config_from_hf

_PACKAGE = pathlib.Path(__file__).parents[1]


def model_names() -> tuple[str, ...]:
    """Models whose shapes are known, such as "llama3.1-8b"."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def model_config(name_or_path: str | os.PathLike[str]) -> Config:
    """The architecture of a model.

    Args:
      name_or_path: One of `model_names` (capitals, hyphens and points do not matter), a YAML or JSON file with the
        settings of a Hugging Face `config.json`, or a folder that has one.

    Raises:
      ValueError: There is no such name or file, it is not readable, or it describes a model that is not supported.
    """
    name, path = os.fspath(name_or_path), pathlib.Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml", ".json") or path.is_dir():
        return _read(path / "config.json" if path.is_dir() else path)
    same = [known for known in model_names() if _letters(known) == _letters(name)]
    if same:
        return _read(_folder() / f"{same[0]}.yaml")
    near = difflib.get_close_matches(name.lower(), model_names(), cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"No model called {name!r} is known.{hint} Known are {', '.join(model_names())}; or give a file with the "
        "settings of a config.json."
    )


def _letters(name: str) -> str:
    """A name as one hears it: "Llama-3.1-8B" is "llama318b"."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


@functools.cache
def _folder() -> pathlib.Path:
    """Where the YAML files are: inside an installed package, beside it in a checkout."""
    installed = _PACKAGE / "configs" / "models"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs" / "models"


def _read(path: pathlib.Path) -> Config:
    try:
        text = path.read_text(encoding="utf-8")
        # To YAML 1.1 a JSON number such as 1e-05 is a string.
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be parsed: {' '.join(str(error).split())}.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}; expected the settings of a config.json.")
    return config_from_hf(settings, str(path))
