"""Locret's oracle in limits where it must equal something simpler; no output of the authors' code is recorded."""

import math

import numpy as np

from tests.oracles import locret
from tests.oracles.attention import attention
from tests.oracles.top_k import top_k


def test_one_chunk_is_top_k_and_the_local_tokens(rng):
    scores = rng.normal(size=(2, 30))
    *_, last = locret.chunked_kept(scores, budget=12, chunk=100, local=4, stabilizers=5)
    want = [[*row, *range(26, 30)] for row in top_k(scores[:, :26], 8)]
    np.testing.assert_array_equal(last, want)


def test_an_important_token_stays_through_all_chunks_and_an_unimportant_one_only_as_a_stabilizer():
    scores = np.tile(np.arange(40.0), (1, 1))
    scores[0, 3], scores[0, 7] = 100, -1
    history = locret.chunked_kept(scores, budget=10, chunk=8, local=2, stabilizers=4)
    assert [len(x[0]) for x in history] == [8, 8, 8, 8, 8, 10]
    assert all(3 in x[0] for x in history)
    assert [7 in x[0] for x in history] == [True, False, False, False, False, False]
    for x, stop in zip(history[:4], (8, 16, 24, 32), strict=True):
        assert set(range(stop - 4, stop)) <= set(x[0])


def test_stabilizers_do_not_protect_after_the_last_chunk():
    scores = -np.arange(20.0)[None]
    *before, last = locret.chunked_kept(scores, budget=6, chunk=6, local=2, stabilizers=3)
    np.testing.assert_array_equal(before[0], [[0, 3, 4, 5]])
    np.testing.assert_array_equal(last, [[0, 9, 10, 11, 18, 19]])


def test_a_budget_of_everything_is_full_attention(rng):
    q, k, v = (rng.normal(size=(heads, 25, 8)) for heads in (4, 2, 2))
    out = locret.chunked_attention(q, k, v, rng.normal(size=(2, 25)), budget=25, chunk=7, local=3, stabilizers=2)
    np.testing.assert_allclose(out, attention(q, k, v), atol=1e-12)


def test_a_prompt_shorter_than_the_local_part_is_kept(rng):
    assert [x.tolist() for x in locret.chunked_kept(rng.normal(size=(1, 3)), budget=9, local=4)] == [[[0, 1, 2]]]


def test_scores_are_a_function_of_a_tokens_own_projections(rng):
    q, k, v = (rng.normal(size=(heads, 6, 4)) for heads in (4, 2, 2))
    w1, w2 = rng.normal(size=(32, 5)), rng.normal(size=(5, 2))
    scores = locret.retaining_scores(q, k, v, w1, w2)
    assert scores.shape == (2, 6)
    rows = np.concatenate([x.transpose(1, 0, 2).reshape(6, -1) for x in (q, k, v)], axis=1)
    hidden = rows @ w1
    np.testing.assert_allclose(scores, (hidden / (1 + np.exp(-hidden)) @ w2).T)


def test_importance_is_the_largest_logit(rng):
    q, k = rng.normal(size=(4, 3, 8)), rng.normal(size=(2, 5, 8))
    logits = np.einsum("hgad,htd->hgat", q.reshape(2, 2, 3, 8), k) / math.sqrt(8)
    np.testing.assert_allclose(locret.causal_importance(q, k), logits.max(axis=(1, 2)))


def test_loss_by_hand():
    """Errors 0.5 (squared part) and 2 (linear part); neighbours differ by 3 in one of two layers."""
    scores, targets = np.array([[[0.5, 0.5]], [[2.0, -1.0]]]), np.array([[[0.0, 0.5]], [[0.0, -1.0]]])
    want = (0.125 + 0 + 1.5 + 0) / 4 + 0.0025 * 9
    assert locret.retaining_loss(scores, targets) == want
