"""A training loop that can be stopped at any moment and goes on where it was: same data, same state, same log.

    def step(state, batch):  # Usually jitted, with the state donated.
        ...
        return state, {"loss": loss}

    state = train(step, state, batches, 1000, "runs/mine", every=100)

Everything that changes lives in `state` (parameters, optimizer state, random keys), and a batch is a function of the
number of its step, so a run that was killed and started again ends with the same bits as one that was not.
"""

import itertools
import json
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from rich import progress

from kvjax.checkpoints import CheckpointError
from kvjax.checkpoints.orbax import load_pytree, save_pytree

State = TypeVar("State")
Path = str | os.PathLike[str]


class TrainingError(RuntimeError):
    """Training cannot begin, go on or be resumed; the message says why, and what to do."""


def train(
    step: Callable[[State, Any], tuple[State, Mapping[str, Any]]],
    state: State,
    batches: Callable[[int], Any],
    steps: int,
    folder: Path,
    *,
    every: int = 100,
    log_every: int = 10,
    keep: int = 2,
    settings: Mapping[str, Any] | None = None,
    show: bool = True,
) -> State:
    """Runs `step` until `steps` steps are done, from the last checkpoint in `folder` if there is one.

    Args:
      step: `step(state, batch) -> (state, metrics)`; metrics are scalars by name. May donate the state.
      state: The first state, any pytree of arrays (optax states too). If there is a checkpoint, it gives structure,
        shapes, dtypes and shardings of what is loaded.
      batches: `batches(i)` is the batch of step i, counted from 0, whatever ran before.
      steps: In all, earlier runs included.
      folder: Made if it is missing. Holds `step-00000100` and so on (Orbax) and `log.jsonl`, one line of JSON with
        step, metrics and seconds since the start of this run per logged step.
      every: Steps between checkpoints; the last step always makes one.
      log_every: Steps between lines of the log. Metrics in between stay on the device, so that steps overlap.
      keep: Newest checkpoints that stay; older ones are deleted.
      settings: What the run depends on beside the state (JSON values). Kept in every checkpoint; a run with other
        settings does not continue this one.
      show: A progress bar on standard error.

    Returns:
      The state after the last step; at once if the folder has it already.

    Raises:
      TrainingError: A metric is not finite (the checkpoint before is intact), or the folder holds something else: a run
        with other settings or shapes, or one that is longer than `steps`.
    """
    for name, value in (("steps", steps), ("every", every), ("log_every", log_every), ("keep", keep)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    place = pathlib.Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    done, state = _resume(place, state, dict(settings or {}), steps)
    _trim_log(place, done)
    if done == steps:
        return state
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with (
        progress.Progress(*columns, console=_console(), disable=not show) as bar,
        open(place / "log.jsonl", "a", encoding="utf-8") as log,
    ):
        task = bar.add_task("training", total=steps, completed=done)
        for i in range(done, steps):
            state, metrics = step(state, batches(i))
            if (i + 1) % log_every == 0 or i + 1 == steps:
                numbers = _finite(jax.device_get(dict(metrics)), i + 1, place)
                seconds = round(time.perf_counter() - start, 3)
                log.write(json.dumps({"step": i + 1, **numbers, "seconds": seconds}) + "\n")
                log.flush()
                bar.update(task, description=" ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
            if (i + 1) % every == 0 or i + 1 == steps:
                _finite(jax.device_get(dict(metrics)), i + 1, place)  # What is saved is worth going on from.
                _save(place, i + 1, state, dict(settings or {}), keep)
            bar.update(task, completed=i + 1)
    return state


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log, in order: step, metrics, seconds. A line that was cut off while writing is left out."""
    file = pathlib.Path(folder) / "log.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def load_state(folder: Path, like: State) -> tuple[int, State]:
    """The newest checkpoint of a run: the number of its steps, and the state in the structure of `like`.

    Raises:
      TrainingError: There is none, or it holds a state of another structure.
    """
    newest = next(iter(_checkpoints(pathlib.Path(folder))), None)
    if newest is None:
        raise TrainingError(f"{folder} holds no checkpoint of a training run.")
    return newest[0], _load(newest[1], like)[0]


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _finite(metrics: Mapping[str, Any], step: int, folder: pathlib.Path) -> dict[str, float]:
    numbers = {name: float(value) for name, value in metrics.items()}
    if wrong := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise TrainingError(
            f"{wrong[0]} is {numbers[wrong[0]]} at step {step}. The last checkpoint in {folder} is from before; try a "
            "lower learning rate, or clip gradients."
        )
    return numbers


def _checkpoints(folder: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """Complete checkpoints, the newest first. Orbax names a folder `step-...` only when all of it is written."""
    found = [(re.fullmatch(r"step-(\d{8})", path.name), path) for path in folder.glob("step-*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _save(folder: pathlib.Path, step: int, state: Any, settings: dict[str, Any], keep: int) -> None:
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    tree = {
        "step": step,
        "settings": json.dumps(settings, sort_keys=True),
        "names": [jax.tree_util.keystr(path) for path, _ in paths],
        "leaves": [leaf for _, leaf in paths],  # By number: optax' own tuples are not looked up by name.
    }
    save_pytree(folder / f"step-{step:08d}", tree, overwrite=True)
    for _, old in _checkpoints(folder)[keep:]:
        shutil.rmtree(old)


def _load(path: pathlib.Path, like: Any) -> tuple[Any, str]:
    """The state of a checkpoint in the structure of `like`, and its settings."""
    try:
        tree = load_pytree(path)
    except CheckpointError as error:
        raise TrainingError(f"{error} Delete {path} to go on from the checkpoint before.") from None
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    missing = itertools.zip_longest(tree["names"], [jax.tree_util.keystr(path) for path, _ in paths])
    for old, new in missing:
        if old != new:
            raise TrainingError(
                f"{path} holds another state: {old or 'nothing'} where this run has {new or 'nothing'}."
            )
    leaves = []
    for (where, want), found in zip(paths, tree["leaves"], strict=True):
        shape, dtype = jax.numpy.shape(want), jax.numpy.result_type(want)
        if (found.shape, found.dtype) != (shape, dtype):
            name = jax.tree_util.keystr(where)
            raise TrainingError(
                f"{path} holds another state: {name} is {found.dtype}{list(found.shape)}, in this run "
                f"{dtype}{list(shape)}. Train in another folder."
            )
        leaves.append(jax.device_put(found, want.sharding) if isinstance(want, jax.Array) else found)
    return jax.tree.unflatten(structure, leaves), tree["settings"]


def _resume(folder: pathlib.Path, state: Any, settings: dict[str, Any], steps: int) -> tuple[int, Any]:
    """Steps that are done, and the state after them."""
    found = _checkpoints(folder)
    if not found:
        return 0, state
    done, path = found[0]
    if done > steps:
        raise TrainingError(f"{folder} is at step {done}, and {steps} were asked for. Ask for more, or delete {path}.")
    state, before = _load(path, state)
    if before != json.dumps(settings, sort_keys=True):
        raise TrainingError(f"{folder} was trained with {before}, not with {settings}. Train in another folder.")
    return done, state


def _trim_log(folder: pathlib.Path, done: int) -> None:
    """Lines of steps after the checkpoint will be written again."""
    lines = [json.dumps(line) + "\n" for line in read_log(folder) if line["step"] <= done]
    partial = folder / "log.jsonl.partial"
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(folder / "log.jsonl")
