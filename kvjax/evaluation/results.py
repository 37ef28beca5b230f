"""Results on disk: a list of rows in one JSON file, replaced as a whole: an interruption never leaves half of one."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax

Row = dict[str, Any]
FILE = "results.json"


def versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("kvjax")
    except importlib.metadata.PackageNotFoundError:  # Run from a folder that is not installed.
        own = "unknown"
    return {
        "kvjax": own,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
    }


def config_hash(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that tell configurations apart."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder for results, and makes sure that it can be written to before anything is computed.

    Raises:
      ValueError: It cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # Of no name that another process in this folder may be writing.
            pass
    except OSError as error:
        raise ValueError(f"Cannot write to the folder {folder}: {error.strerror}. Choose another (--out).") from None


def read_rows(folder: pathlib.Path, config: Mapping[str, Any], overwrite: bool = False) -> list[Row]:
    """Rows that an earlier run of the same configuration has left; none if there was none, or with `overwrite`.

    Raises:
      ValueError: The file is of another configuration, or is none of ours.
    """
    path = folder / FILE
    if overwrite or not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        hashes = {row["config_hash"] for row in rows}
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path} holds no results of kvjax. Choose another folder (--out), or --overwrite it."
        ) from None
    if hashes - {config_hash(config)}:
        other = next(row["config"] for row in rows if row["config_hash"] != config_hash(config))
        differs = [key for key in config if other.get(key) != config[key]]
        raise ValueError(
            f"{path} is of a run with other settings ({', '.join(differs)}). Choose another folder (--out), or "
            "--overwrite it."
        )
    return rows


def write_rows(folder: pathlib.Path, rows: Sequence[Row]) -> None:
    """Replaces the file of rows: a reader sees the old ones or the new ones, whenever this process is killed."""
    write_json(folder / FILE, rows)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces a file at once.

    A bucket that is mounted as a folder renames by a copy, which is as atomic, and a deletion. Of several processes,
    which have the same values and may share the folder, the first writes.
    """
    if jax.process_index() > 0:
        return
    partial = path.with_name(f"{path.name}.partial")  # One name: what a killed run leaves, the next one replaces.
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=True)
            file.flush()
            os.fsync(file.fileno())  # Or a machine that goes down could keep the new name and lose the content.
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
