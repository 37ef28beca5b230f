"""The same prompts, rules and protocol as NVIDIA kvpress: the same answers, likelihoods and slots (question-agnostic).

`tests/data/needles_gemma3_270m.json` holds what kvpress 0.5.4 gave for Gemma 3 270M in float32. Named differences of
definition: kvpress' StreamingLLM compresses once and keeps the text's positions (here: an `Evict` with sinks and recent
tokens); its PyramidKV spreads budgets over all 18 layers, also the 15 that it does not compress (here: the slots that
it kept); its ratio 0.9 keeps 199 tokens by float rounding (here: the number); random choices differ.

`KVJAX_PARITY_PROMPTS=12` runs all prompts (default 2: the others only repeat the same computation).
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.generation.extend import extend_hidden, with_room
from kvjax.models import stack_layers
from kvjax.models.transformer import unembed
from kvjax.policies import Evict, Needs, Policy
from kvjax.policies.budget import np_like
from kvjax.policies.score import Chance

pytestmark = pytest.mark.slow
DATA = json.loads((Path(__file__).parent / "data" / "needles_gemma3_270m.json").read_text())
PROMPTS = DATA["niah"][: int(os.environ.get("KVJAX_PARITY_PROMPTS", "2"))]
RULES = {
    "none": "full",
    "SnapKV": "snapkv({n}, window=64)",
    "TOVA": 'tova({n}, phase="prompt")',
    "Knorm": "knorm({n})",
    "KeyDiff": "keydiff({n})",
    "ExpectedAttention": "expected_attention({n})",
    "ChunkKV(SnapKV)": "chunkkv({n}, score=snapkv(window=64), chunk=20)",
    "PyramidKV": "snapkv({n}, window=64)",
    "ObservedAttention": 'h2o({n}, recent=0, phase="prompt", normalized=True)',
}


@dataclasses.dataclass(frozen=True)
class Given:
    """Slots per layer as they were recorded."""

    slots: tuple[int, ...]

    def __call__(self, mean, length, layers, least):
        xp = np_like(length)
        return xp.stack([slots + 0 * length for slots in self.slots])


def peer_policy(name: str, kept: list[int]) -> Policy:
    if name == "StreamingLLM":
        evict = Evict(score=Chance(), budget=kvjax.Budget(tokens=kept[0]), sinks=4, recent=kept[0] - 4)
        return Policy(stages=(evict,))
    policy = kvjax.parse_policy(RULES[name].format(n=kept[0]))
    if len(set(kept)) == 1:
        return policy
    return dataclasses.replace(policy, stages=(dataclasses.replace(policy.stages[0], allocate=Given(tuple(kept))),))


CASES = {
    key: (peer_policy(key.rsplit("|", 1)[0], row["kept_per_full_layer"]), row)
    for key, row in DATA["kvpress"].items()
    if key.rsplit("|", 1)[0] in {*RULES, "StreamingLLM"}
    and key.endswith(("|0.0", "|0.75", "PyramidKV|0.5", "SnapKV)|0.5"))
}


@pytest.fixture(scope="module")
def observed(gemma):
    """Every prompt, prefilled once for all policies."""
    needs = functools.reduce(Needs.__or__, (policy.needs for policy, _ in CASES.values()))
    out = []
    for sample in PROMPTS:
        tokens, lengths = gemma.encode(sample["context_ids"])
        out.append(kvjax.observe(gemma.params, gemma.config, tokens, lengths, needs))
    return out


@pytest.fixture(scope="module")
def stacked(gemma):
    """Like layers together: they compile once."""
    return stack_layers(gemma.params, gemma.config)


@pytest.mark.parametrize("key", CASES)
def test_same_as_kvpress(key, gemma, stacked, observed):
    policy, recorded = CASES[key]
    config = gemma.config
    for i, (sample, seen) in enumerate(zip(PROMPTS, observed, strict=True)):
        plan = kvjax.plan(policy, config, np.asarray(seen.lengths), jnp.float32)
        cache = kvjax.compress(plan, seen)
        kept = [int(cache.layers[layer].count.max()) for layer in config.full_layers]
        assert kept == recorded["kept_per_full_layer"]

        question, answer = sample["question_ids"], jnp.asarray(sample["answer_ids"])
        tail = jnp.asarray([question + sample["answer_ids"]], jnp.int32)[:, :-1]
        room = with_room(cache, tail.shape[1])
        x, _ = extend_hidden(stacked, config, policy, room, tail, jnp.ones(tail.shape, bool))
        logits = unembed(gemma.params, config, x[0, len(question) - 1 :])
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), answer[:, None], 1).mean()
        assert float(nll) == pytest.approx(recorded["answer_nll"][i], rel=0.02, abs=1e-4)
        assert bool((logits.argmax(-1) == answer).all()) == recorded["correct"][i]
