"""Maps of heads against attention matrices computed in NumPy."""

import numpy as np
import pytest

import kvjax
from kvjax.evaluation import make_task
from kvjax.evaluation.heads import LOCAL, SINKS, head_maps, where
from kvjax.models.transformer import embed, plain_attend, positions, run_layers


@pytest.fixture(scope="module")
def model():
    return kvjax.load("tiny")


def attention(model, ids):
    """Attention matrices [layers, heads, tokens, tokens] of all layers."""
    seen = []

    def attend(spec, state, new, shared):
        q, k = (np.asarray(x[0], np.float64) for x in (new.q, new.k))
        logits = spec.scale * np.einsum("htd,hsd->hts", q, np.repeat(k, len(q) // len(k), 0))
        logits = np.where(np.tri(len(ids), dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        seen.append(weights / weights.sum(-1, keepdims=True))
        return plain_attend(spec, state, new, shared)

    tokens = np.asarray([ids], np.int32)
    states = [None] * model.config.num_layers
    pos = positions(tokens, None)
    run_layers(model.params, model.config, embed(model.params, model.config, tokens), pos, states, None, attend)
    return np.stack(seen)


def test_maps_agree_with_attention_matrices(model):
    sample = make_task("needle", context=150, count=1).samples(model)[0]
    prompt, answer = [*sample.context_ids, *sample.question_ids], list(sample.answers[0])
    maps = head_maps(model, [(prompt, answer)])
    weights = attention(model, prompt + answer[:-1])
    rows = np.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    looked, start = weights[:, :, rows], where(prompt, answer)
    near = rows[:, None] - np.arange(weights.shape[-1]) < LOCAL
    np.testing.assert_allclose(maps.sink, looked[..., :SINKS].sum(-1).mean(-1), atol=1e-4)
    np.testing.assert_allclose(maps.local, (looked * near).sum(-1).mean(-1), atol=1e-4)
    wanted = np.arange(start, start + len(answer))
    np.testing.assert_allclose(maps.retrieval, (looked.argmax(-1) == wanted).mean(-1), atol=1 / len(answer) + 1e-6)
    assert maps.tokens == len(answer) and maps.retrieval.max() > 0.5  # It answers, so some head copies.


def test_the_last_place_counts():
    assert where([1, 2, 3, 1, 2], [1, 2]) == 3
    assert where([1, 2], [2, 1]) == -1


def test_what_cannot_be_copied_is_refused(model):
    with pytest.raises(ValueError, match="do not stand in the prompt"):
        head_maps(model, [([1, 2, 3], [9, 9])])
    with pytest.raises(ValueError, match="at least one prompt"):
        head_maps(model, [])
