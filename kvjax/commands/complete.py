"""What the shell completes: names of policies, tasks and models. `kvjax --install-completion` sets it up."""

import pathlib
import re
from collections.abc import Iterable


def policies(incomplete: str) -> list[str]:
    """The method that is being written, after those that are: "full; sn" -> "full; snapkv"."""
    from kvjax.policies import methods

    return _after(incomplete, methods())


def policies_or_grids(incomplete: str) -> list[str]:
    """Also files that hold a grid."""
    return policies(incomplete) + [path for path in _paths(incomplete) if path.endswith(("/", ".yaml", ".yml"))]


def method(incomplete: str) -> list[str]:
    """A single name."""
    from kvjax.policies import methods

    return [name for name in methods() if name.startswith(incomplete)]


def tasks(incomplete: str) -> list[str]:
    """The task or group that is being written, after those that are; or a file of JSON lines."""
    from kvjax.evaluation.tasks import TASKS, groups

    files = [path for path in _paths(incomplete) if path.endswith(("/", ".jsonl"))]
    return _after(incomplete, dict.fromkeys([*TASKS, *groups()])) + files


def models(incomplete: str) -> list[str]:
    """One that comes with a package, or a folder or file of a checkpoint."""
    from kvjax.checkpoints.packaged import PACKAGES

    names = [name for name in ("tiny", *PACKAGES) if name.startswith(incomplete)]
    return names + [path for path in _paths(incomplete) if path.endswith(("/", ".gguf"))]


def _after(incomplete: str, names: Iterable[str]) -> list[str]:
    before, last = re.fullmatch(r"(.*[;|]\s*)?(.*)", incomplete, re.DOTALL).groups("")  # type: ignore[union-attr]
    return [before + name for name in names if name.startswith(last)]


def _paths(incomplete: str) -> list[str]:
    """Folders, which end in a slash, and files; nothing where nothing has been written."""
    if not incomplete:
        return []
    folder, slash, name = incomplete.rpartition("/")
    try:
        found = sorted(pathlib.Path(folder + slash or ".").iterdir())
    except OSError:
        return []
    return [folder + slash + path.name + "/" * path.is_dir() for path in found if path.name.startswith(name)]
