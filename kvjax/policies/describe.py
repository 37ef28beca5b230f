"""The parts of a policy in words, for listings and tables."""

import dataclasses
from typing import Any

from kvjax.policies.policy import Policy
from kvjax.policies.read import ReadAll
from kvjax.policies.stage import Evict, Forget, Ring, SplitHeads, Stage
from kvjax.policies.store import Slotwise, Store


def parts(policy: Policy) -> dict[str, str]:
    """What a policy is made of: score, budget, reduce, store, read and phase; "-" where a part is missing."""
    stages = policy.stages
    return {
        "score": _joined(stage.score for stage in stages if isinstance(stage, Evict)),
        "budget": _joined(_budget(stage) for stage in stages),
        "reduce": _joined([*(_reduce(stage) for stage in stages), *([policy.transform] if policy.transform else [])]),
        "store": _store(policy.store),
        "read": "all" if policy.read == ReadAll() else show(policy.read),
        "phase": phase(policy),
    }


def phase(policy: Policy) -> str:
    """When a policy acts: "end of prompt", "every step", "on write" if it only stores, "on read" if it only reads in a
    way of its own, "-" if it does nothing."""
    if policy.stages:
        return _joined(stage.phase for stage in policy.stages)
    if policy.transform is not None:
        return "every step"
    if policy.store is not None:
        return "on write"
    return "-" if policy.read == ReadAll() else "on read"


def show(part: Any) -> str:
    """A part with its parameters, such as `WindowAttention(window=32, pool=5, kind='avg')` or `TopTokens`."""
    if not dataclasses.is_dataclass(part):
        return repr(part)
    if "__str__" in vars(type(part)):
        return str(part)
    given = [f"{field.name}={show(getattr(part, field.name))}" for field in dataclasses.fields(part)]
    return type(part).__name__ + (f"({', '.join(given)})" if given else "")


def _store(store: Store | None) -> str:
    if store is None:
        return "full precision"
    return f"single tokens as {show(store.codec)}" if isinstance(store, Slotwise) else show(store)


def _joined(values: Any) -> str:
    texts = [value if isinstance(value, str) else show(value) for value in values]
    return ", then ".join(dict.fromkeys(texts)) or "-"


def _budget(stage: Stage) -> str:
    allocate = f" by {show(stage.allocate)}" if isinstance(stage, Evict) else ""
    return f"{stage.budget}{allocate}"


def _reduce(stage: Stage) -> str:
    if isinstance(stage, Ring):
        kept = f", {stage.sinks} sinks stay" if stage.sinks else ""
        return f"oldest is overwritten{kept}"
    if isinstance(stage, Evict):
        stays = [f"{stage.sinks} sinks"] if stage.sinks else []
        stays += [f"recent {stage.recent}"] if stage.recent else []
        rest = "" if stage.rest == Forget() else f"; the rest: {show(stage.rest)}"
        return f"evict, {show(stage.select)}" + (f", {' and '.join(stays)} stay" if stays else "") + rest
    if isinstance(stage, SplitHeads):
        share = f"{stage.sparsity:.0%} of the heads"
        return f"oldest is overwritten in {share}, {stage.sinks} sinks and recent {stage.recent} stay"
    return type(stage).__name__
