"""The contract on trained models: the house model (4 KV heads, 6 layers) and Gemma 3 270M (1 KV head, 3 full-attention
layers among sliding ones). Real text, two prompts of different length; every method and the compositions across kinds
on the house model, one method of every kind on Gemma.

`test_contract.py` asks more of every method, on a random model; here is what trained weights could break. Layers are
stacked where all of them are compiled together: like ones compile once, where their caches are alike too.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import kvjax
from kvjax.cache.types import tree_nbytes
from kvjax.checkpoints.orbax import load_cache, save_cache
from kvjax.models import stack_layers
from kvjax.training.locret import init_retaining_heads, with_retaining_heads
from tests.tiny import assert_trees_equal, small

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
LENGTHS, ASKED, EVERYTHING = np.array([208, 150], np.int32), 6, 4096
COMPOSITIONS = ("adakv(0.5) | kivi(bits=4, residual=32)", "cake(0.5) | think(0.4)", "minicache | int4")
NAMES = [*kvjax.methods(), *COMPOSITIONS]
KINDS = (  # One of each: layout, budget, phase, what layers share.
    *("full", "snapkv", "adakv", "streaming_llm", "h2o", "kivi", "gear", "think", "shadowkv"),
    *("tidaldecode", "quest", "minicache | int4"),
)
SAME = 2e-3  # Of logits around 20: another order of the same float32 sums, through 18 layers.


def policy_of(name: str, **changes) -> kvjax.Policy:
    return kvjax.parse_policy(name) if name in COMPOSITIONS else small(name, **changes)


def on_models(names: list[str]):
    """Parametrizes a test by model and name: all names on the house model, those in `KINDS` on Gemma."""
    tiny_ones = [pytest.param("tiny", name, id=f"tiny-{name}") for name in names]
    some = [name for name in names if name in KINDS]
    gemma_ones = [pytest.param("gemma3-270m", name, id=f"gemma-{name}", marks=pytest.mark.slow) for name in some]
    return pytest.mark.parametrize("model, name", tiny_ones + gemma_ones, indirect=["model"])


@pytest.fixture(scope="module")
def model(request) -> kvjax.Model:
    """With retaining heads, trained or not: what is asked here holds for any."""
    model = request.getfixturevalue("gemma") if request.param == "gemma3-270m" else kvjax.load("tiny")
    if "trained" in model.params["layers"][0]:
        return model
    heads = init_retaining_heads(model.config, jax.random.key(0), hidden=32)
    return kvjax.Model(with_retaining_heads(model.params, model.config, heads), model.config, model.tokenizer)


def text(model: kvjax.Model) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [2, 208] int32, two passages, and what follows each [2, 6]."""
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(TEXT, add_bos=False)
    passages = [ids[:300], ids[600:900]]
    prompts = [[model.tokenizer.bos_id, *passage[: LENGTHS.max() - 1]] for passage in passages]
    after = [passage[n - 1 : n - 1 + ASKED] for passage, n in zip(passages, LENGTHS, strict=True)]
    return np.asarray(prompts, np.int32), np.asarray(after, np.int32)


@pytest.fixture(scope="module")
def stacked(model) -> dict:
    """The model's params, like layers together."""
    return stack_layers(model.params, model.config)


@pytest.fixture(scope="module")
def observed(model):
    """needs -> the prompts, prefilled once for all policies with these needs."""
    tokens, _ = text(model)
    return functools.cache(lambda needs: kvjax.observe(model.params, model.config, tokens, LENGTHS, needs))


@pytest.fixture(scope="module")
def full_answers(model) -> np.ndarray:
    """Logits of the questions after the full cache, layers apart."""
    policy, (tokens, question) = kvjax.policy("full"), text(model)
    cache = kvjax.prefill(model.params, model.config, policy, tokens, LENGTHS)
    return ask(model.params, model.config, policy, cache, question)[0]


def skip_single_heads(model: kvjax.Model, policy: kvjax.Policy) -> None:
    """A method that shares slots among KV heads says so where there is one, and what to use instead."""
    if policy.stages and policy.stages[-1].ragged and model.config.num_kv_heads == 1:
        with pytest.raises(kvjax.PolicyError, match="has a single one.*such as snapkv"):
            kvjax.plan(policy, model.config, LENGTHS, np.float32)
        pytest.skip("One KV head.")


def ask(params: dict, config: kvjax.Config, policy: kvjax.Policy, cache: kvjax.Cache, question: np.ndarray):
    cache = jax.device_put(cache, jax.devices()[0])  # As caches from the disk are: all share a compilation.
    logits, cache = kvjax.extend(params, config, policy, cache, question)
    return np.asarray(logits), cache


@on_models(NAMES)
def test_the_contract(model, stacked, observed, name, tmp_path):
    policy, (tokens, question) = policy_of(name), text(model)
    params, config = stacked if policy.in_chunks else model.params, model.config
    skip_single_heads(model, policy)
    logits, cache = kvjax.prefill_logits(params, config, policy, tokens, LENGTHS)

    # Bytes are those of the leaves, and fewer than the full cache's where the method saves any.
    assert cache.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == tree_nbytes(cache)
    assert np.isfinite(np.asarray(logits)).all()

    # One prefill feeds many policies, with the same bits.
    if not policy.in_chunks:
        plan = kvjax.plan(policy, config, LENGTHS, params["embed"].dtype)
        assert_trees_equal(kvjax.compress(plan, observed(policy.needs)), cache)

    # A row alone is the same row, before and after more tokens.
    answers, after = ask(stacked, config, policy, cache, question)
    alone = kvjax.prefill(params, config, policy, tokens[1:, : LENGTHS[1]])
    found, _ = ask(stacked, config, policy, alone, question[1:])
    tolerance = SAME if policy.store is None and policy.transform is None else 50 * SAME
    np.testing.assert_allclose(found[0], answers[1], atol=tolerance)
    assert np.asarray(after.seen).tolist() == (LENGTHS + ASKED).tolist()

    # What comes back from the disk goes on alike.
    save_cache(tmp_path / "cache", cache)
    back = load_cache(tmp_path / "cache")
    np.testing.assert_array_equal(ask(stacked, config, policy, back, question)[0], answers)


@on_models([name for name in kvjax.methods() if "budget" in kvjax.methods()[name].parameters])
def test_a_budget_of_everything_is_full_attention(model, stacked, full_answers, name):
    policy, (tokens, question) = policy_of(name, budget=EVERYTHING), text(model)
    skip_single_heads(model, policy)
    cache = kvjax.prefill(stacked if policy.in_chunks else model.params, model.config, policy, tokens, LENGTHS)
    np.testing.assert_allclose(ask(stacked, model.config, policy, cache, question)[0], full_answers, atol=SAME)
