"""Block sizes: a small table per kind of device that a script measures and writes, and a heuristic where it is silent.

A table is a JSON file in `kvjax/kernels/tuned/`: {"device", "jax", "commit", "date", "entries": [...]}. An entry names
a kernel, what decides its speed (kind of store, channels, rows, slots) and the options that were fastest.
`KVJAX_TUNED` names a folder with tables of one's own; its entries come first.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvjax.kernels.choose import device_kind
from kvjax.kernels.decode.request import Request
from kvjax.kernels.vectors import Vectors

FOLDER = Path(__file__).parent / "tuned"
VARIABLE = "KVJAX_TUNED"


@dataclasses.dataclass(frozen=True)
class Shape:
    """What decides the speed of a decode kernel.

    Attributes:
      kind: How keys and values are stored, such as "bfloat16" or "4-bit/32 tokens 4-bit/32 channels".
      dim: Channels of a key.
      rows: Query rows per KV head.
      slots: Stored slots.
    """

    kind: str
    dim: int
    rows: int
    slots: int


def kind(vectors: Vectors | None) -> str:
    """How vectors are stored, in words."""
    if vectors is None:
        return "latent"
    if not vectors.bits:
        return vectors.codes.dtype.name
    tokens, channels = vectors.group
    return f"{vectors.bits}-bit/" + (f"{tokens} tokens" if tokens > 1 else f"{channels} channels")


def shape(request: Request) -> Shape:
    """Of a request."""
    both = dict.fromkeys([kind(request.k), kind(request.v)])
    return Shape(" ".join(both), request.k.dim, request.q.shape[2], request.k.slots)


def file_name(device: str) -> str:
    """Of a device's table."""
    return device.lower().replace(" ", "_") + ".json"


@functools.lru_cache
def table(device: str, extra: str | None) -> tuple[Mapping[str, Any], ...]:
    """The entries for a kind of device, one's own first.

    Raises:
      ValueError: A table is not what it should be; names the file.
    """
    entries: list[Mapping[str, Any]] = []
    for folder in ([Path(extra)] if extra else []) + [FOLDER]:
        path = folder / file_name(device)
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text())["entries"]
            entries += [entry for entry in found if {"kernel", "kind", "dim", "rows", "slots", "options"} <= set(entry)]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no table of tuned kernels: {error}.") from error
    return tuple(entries)


def tuned(kernel: str, wanted: Shape, device: str | None = None) -> dict[str, Any]:
    """Options measured for the nearest shape: same kernel, kind and channels, then the nearest slots and rows.

    Those with a block of more slots than there are do not count.

    Returns:
      Keyword arguments of the kernel; empty where nothing was measured, which leaves the choice to its heuristic.
    """
    device = device or device_kind()
    same = [
        entry
        for entry in table(device, os.environ.get(VARIABLE))
        if (entry["kernel"], entry["kind"], entry["dim"]) == (kernel, wanted.kind, wanted.dim)
        and entry["options"].get("block", 0) <= wanted.slots
    ]
    if not same:
        return {}

    def distance(entry: Mapping[str, Any]) -> tuple[float, float]:
        apart = lambda a, b: abs(max(a, 1).bit_length() - max(b, 1).bit_length())  # noqa: E731
        return apart(entry["slots"], wanted.slots), apart(entry["rows"], wanted.rows)

    return dict(min(same, key=distance)["options"])


def write_table(path: Path, about: Mapping[str, Any], entries: list[Mapping[str, Any]]) -> None:
    """Writes a table, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps({**about, "entries": entries}, indent=1) + "\n")
    scratch.replace(path)
