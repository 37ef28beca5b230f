"""The caches of the runner: as `prefill` makes them, and alike for prompts that are padded to the same length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.evaluation.caches import alike, compressed, see, sizes
from kvjax.evaluation.cases import Case
from kvjax.evaluation.tasks import Sample
from tests import tiny

LENGTHS = 41, 45, 48
POLICIES = {
    "in tokens": "snapkv(12, window=4)",
    "a ratio": "snapkv(0.25, window=4)",
    "a part of the bytes": "snapkv('40%B', window=4)",
    "a ring": "streaming_llm('40%B', sinks=2)",
    "at every step": "h2o('40%B')",
    "layers differ": "pyramidkv('40%B', window=4)",
    "heads differ": "adakv('60%B', score=snapkv(window=4))",
    "stored in bytes": "knorm('50%B') | int8",
    "all bytes": "h2o('100%B')",
    "more than there is": "snapkv('1MB', window=80)",
}


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def case_of(length):
    prompt = tuple(tiny.TOKENS[0, :length].tolist())
    sample = Sample(id="0", context_ids=prompt, question_ids=(1,), answers=((2,),))
    return Case(sample, prompt, question=(1,), tokens=4)


def shapes(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_padding_changes_neither_what_stays_nor_what_is_compiled(model, policy):
    policy, found = kvjax.parse_policy(policy), []
    for length in LENGTHS:
        case = case_of(length)
        observed = see(model, [case.prompt], [policy])
        (plan,), cache = compressed(model, observed, [case.prompt], policy, case.shape[1])
        alone = model.prefill(case.prompt, policy)
        assert tiny.kept(cache, 0) == tiny.kept(alone, 0)
        assert plan.length == length
        question = tiny.QUESTION[0].tolist()
        same, _ = model.extend(cache, question)
        logits, _ = model.extend(alone, question)
        np.testing.assert_allclose(same, logits, atol=2e-4)
        found.append(shapes(cache))
    assert all(shape == found[0] for shape in found)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_row_of_a_batch_is_compressed_as_if_it_were_alone(model, policy):
    policy = kvjax.parse_policy(policy)
    prompts = [tiny.TOKENS[0, :length].tolist() for length in (45, 32, 48)]
    plans, cache = compressed(model, see(model, prompts, [policy]), prompts, policy, room=8)
    alone = [model.prefill(prompt, policy) for prompt in prompts]
    for row, other in enumerate(alone):
        assert tiny.kept(cache, row) == tiny.kept(other, 0)
    assert sizes(plans, model.config, jnp.float32)[0] == sum(other.nbytes for other in alone)


def test_what_is_told_one_budget_for_all_wants_prompts_of_one_length():
    """A number of tokens that bytes are turned into is each prompt's own, unless a policy takes just one."""
    told = {"full": False, "snapkv('40%B')": False, "adakv('60%B')": False, "cake(0.5)": False, "cake('60%B')": True}
    for policy, apart in told.items():
        assert (alike(kvjax.parse_policy(policy), 40) != alike(kvjax.parse_policy(policy), 41)) == apart, policy
