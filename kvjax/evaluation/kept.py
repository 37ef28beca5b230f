"""Who stays: which tokens of a prompt a policy keeps, and how many in every layer and head."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kvjax.cache import EMPTY, Cache
from kvjax.evaluation.caches import compressed
from kvjax.evaluation.cases import Case
from kvjax.evaluation.tasks import Ids
from kvjax.model import Model
from kvjax.policies import Observed, Policy


def kept(cache: Cache) -> list[int]:
    """Slots in use in every full-attention layer; of the head with most, where heads differ."""
    return [int((pos != EMPTY).sum(-1).max()) for pos in positions(cache)]


def positions(cache: Cache) -> list[np.ndarray]:
    """Of every full-attention layer of a cache of one sequence [1 or H, S], `EMPTY` where there is no token."""
    return [pos[0] for pos in jax.device_get([cache.layers[layer].pos for layer in cache.config.full_layers])]


def who_stays(model: Model, observed: Observed, case: Case, policies: Sequence[Policy]) -> dict[str, Any]:
    """Which of the prompt's tokens each policy keeps, and how many in every head; for the report."""
    length, heads = len(case.prompt), model.config.cache_heads

    def of(policy: Policy) -> dict[str, Any]:
        where = positions(compressed(model, observed, [case.prompt], policy)[1])
        counts = [np.broadcast_to((pos != EMPTY).sum(-1), heads).tolist() for pos in where]
        rows = [row for pos in where for row in np.broadcast_to(pos, (heads, pos.shape[1]))]
        held = [np.isin(np.arange(length), row) for row in rows]
        return {"heads": counts, "share": np.mean(held, 0).round(4).tolist() if held else []}

    return {
        "sample": case.sample.id,
        "tokens": texts(model, case.prompt),
        "layers": list(model.config.full_layers),
        "policies": {str(policy): of(policy) for policy in policies},
    }


def texts(model: Model, ids: Ids) -> list[str]:
    """The text of every token; together they are the text of all."""
    if model.tokenizer is None:
        return [f"{token} " for token in ids]
    *pieces, rest = model.tokenizer.stream(ids)
    return [*pieces[:-1], pieces[-1] + rest]
