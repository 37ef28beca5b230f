"""Quest: against its oracle, the authors' recorded output, and what makes it Quest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache.reading import own_slots
from tests import tiny
from tests.methods.layer import compress, kept, spec, step, tokens
from tests.methods.test_against_oracles import DIM, LENGTHS, STEPS, TOLERANCE, decode, prompt, rotated
from tests.oracles import quest, snapkv
from tests.oracles.attention import attention
from tests.oracles.test_golden import golden, reading_inputs


def policy(budget, page=4, dense=0) -> kvjax.Policy:
    return kvjax.policy("quest", budget, page=page, dense=dense)


def chunk(start: int):
    """Tokens start..STEPS after the prompt of every row, in one batch."""
    ahead = [tuple(x[:, n + start :] for x in row) for row, n in zip(rotated(), LENGTHS, strict=True)]
    new = tokens(ahead, 0, STEPS - start)
    return dataclasses.replace(new, pos=jnp.asarray(LENGTHS, jnp.int32)[:, None] + jnp.arange(start, STEPS))


@pytest.mark.parametrize(("budget", "options"), [(14, {}), (24, {"scale": 0.7, "softcap": 3.0})])
def test_decodes_like_its_oracle(budget, options):
    """Ragged rows, grouped queries; one token after another, and all at once: each chooses for itself."""
    cache = compress(policy(budget), spec(DIM, **options), prompt(rotated()))
    outputs, caches = decode(policy(budget), cache, rotated(), options=spec(DIM, **options))
    together, after = step(policy(budget), spec(DIM, **options), cache.reserve(64), chunk(0))
    for row, length in enumerate(LENGTHS):
        q, k, v = rotated()[row]
        # A budget of all there is reads everything; the oracle, like the code, leaves out a last page that is not full.
        want = [
            quest.quest_decode(q[:, : t + 1], k[:, : t + 1], v[:, : t + 1], prompt=t, tokens=budget, page=4, **options)
            if budget < t + 1
            else attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], **options)
            for t in range(length, length + STEPS)
        ]
        np.testing.assert_allclose(outputs[row], np.concatenate(want, 1), atol=TOLERANCE)
        np.testing.assert_allclose(together[row], np.concatenate(want, 1), atol=TOLERANCE)
        np.testing.assert_array_equal(kept(caches[-1], row), kept(after, row))
        held = -(-(length + STEPS) // 4)
        for x, y in ((after.low, caches[-1].low), (after.high, caches[-1].high)):
            np.testing.assert_array_equal(x[row, :, :held], y[row, :, :held])


def test_a_ratio_is_of_what_each_row_holds():
    cache = compress(policy(0.5), spec(DIM), prompt(rotated()))
    outputs, _ = decode(policy(0.5), cache, rotated())
    for row, length in enumerate(LENGTHS):
        q, k, v = rotated()[row]
        for i, t in enumerate(range(length, length + STEPS)):
            want = quest.quest_decode(
                q[:, : t + 1], k[:, : t + 1], v[:, : t + 1], prompt=t, tokens=(t + 1) // 2, page=4
            )
            np.testing.assert_allclose(outputs[row][:, i], want[:, 0], atol=TOLERANCE)


@pytest.mark.parametrize(("length", "budget"), [(256, 64), (251, 64), (251, 48)])
def test_authors(length, budget):
    """The same pages (100 %) and outputs; a budget of 16 tokens reads three pages in their code, as 48 does."""
    data, tag = golden("quantization_reading/quest"), f"n{length}_b{16 if budget == 48 else budget}_c16"
    q, k, v = reading_inputs()
    row = (q * float(data["query_scale"]), k, v)
    made_by, about = policy(budget, page=16), spec(64)
    cache = compress(made_by, about, tokens([row], 0, length - 1))
    new = tokens([tuple(x[:, length - 1 : length] for x in row)], 0, 1)
    new = dataclasses.replace(new, pos=jnp.full((1, 1), length - 1))
    out, after = step(made_by, about, cache.reserve(1), new)
    np.testing.assert_allclose(out[0, :, 0], data[f"{tag}_out"], rtol=1e-3, atol=2e-6)
    scores = np.repeat(np.asarray(after.scores(new.q, own_slots(cache.inner, 1)))[0, :, 0], 16, -1)[:, :length]
    np.testing.assert_allclose(scores, data[f"{tag}_page_score_per_token"], rtol=1e-4, atol=1e-4)
    pages, valid = (np.asarray(x)[0, :, 0] for x in after.choose(new.q, own_slots(cache.inner, 1)))
    mask = np.zeros((8, length), bool)
    for head in range(8):
        for page in pages[head][valid[head]]:
            mask[head, page * 16 : page * 16 + 16] = True
    np.testing.assert_array_equal(mask, data[f"{tag}_kept_mask"])


def test_only_the_chosen_pages_are_read():
    """What stands in the others may be anything: it is not even multiplied by zero."""
    made_by = policy(12)
    cache = compress(made_by, spec(DIM), prompt(rotated()))
    new = chunk(STEPS - 1)
    new = dataclasses.replace(new, pos=jnp.asarray(LENGTHS, jnp.int32)[:, None])
    want, after = step(made_by, spec(DIM), cache.reserve(4), new)
    pages, valid = after.choose(new.q, own_slots(cache.inner, 1))
    read = np.zeros((3, 2, after.low.shape[2]), bool)
    for row, head, i in np.argwhere(np.asarray(valid[:, :, 0])):
        read[row, head // 2, pages[row, head, 0, i]] = True
    for row, own in enumerate(np.asarray(own_slots(cache.inner, 1))[:, 0]):
        read[row, :, own // 4] = True  # The bounds of this page are taken anew.
    assert not read[:2].all((1, 2)).any()
    slots = np.repeat(read, 4, -1)[..., : cache.inner.capacity]
    poison = lambda leaf: jnp.where(slots[..., None], leaf, jnp.nan)  # noqa: E731
    inner = dataclasses.replace(cache.inner, k=poison(cache.inner.k), v=poison(cache.inner.v))
    found, _ = step(made_by, spec(DIM), dataclasses.replace(cache, inner=inner).reserve(4), new)
    np.testing.assert_array_equal(found, want)


def test_pages_of_what_an_eviction_has_left_and_of_rounded_keys():
    """`snapkv | quest | int8`: pages hold other tokens in every head, and bounds are those of the keys as stored."""
    text = "snapkv(24, window=6, pool=3) | quest(12, page=4, dense=0)"
    both = kvjax.parse_policy(text)
    cache = compress(both, spec(DIM), prompt(rotated()))
    outputs, _ = decode(both, cache, rotated())
    for row in (0, 1):
        length = LENGTHS[row]
        q, k, v = rotated()[row]
        scores = snapkv.snapkv_scores(q[:, :length], k[:, :length], window=6, width=3)
        left = snapkv.snapkv_kept(scores, window=6, budget=24)
        for h in range(2):
            held = np.concatenate([left[h], np.arange(length, length + STEPS)])
            mine = q[2 * h : 2 * h + 2], k[h : h + 1, held], v[h : h + 1, held]
            for i in range(STEPS):
                n = len(left[h]) + i + 1
                mask = quest.quest_mask(mine[0][:, length + i], mine[1][:, :n], tokens=12, page=4)
                want = quest.masked_attention(mine[0][:, length + i], mine[1][:, :n], mine[2][:, :n], mask)
                np.testing.assert_allclose(outputs[row, 2 * h : 2 * h + 2, i], want, atol=TOLERANCE)
    rounded = compress(kvjax.parse_policy(f"{text} | int8"), spec(DIM), prompt(rotated()))
    near, _ = decode(kvjax.parse_policy(f"{text} | int8"), rounded, rotated())
    assert 0 < np.abs(near - outputs).mean() < 0.1
    keys = np.asarray(rounded.inner.codec.decode(rounded.inner.k))[0]
    low, high = (np.repeat(np.asarray(x)[0], 4, 1)[:, : keys.shape[1]] for x in (rounded.low, rounded.high))
    assert (low <= keys).all() and (keys <= high).all()


def test_everything_is_full_attention_and_nothing_is_saved():
    full, everything = kvjax.policy("full"), policy(4096)
    (want, _), (found, cache) = (
        kvjax.extend(
            tiny.params(), tiny.CONFIG, p, kvjax.prefill(tiny.params(), tiny.CONFIG, p, tiny.TOKENS), tiny.QUESTION
        )
        for p in (full, everything)
    )
    np.testing.assert_allclose(found, want, atol=2e-5)
    dense = kvjax.prefill(tiny.params(), tiny.CONFIG, full, tiny.TOKENS)
    pages = (
        2 * 2 * tiny.CONFIG.num_kv_heads * tiny.CONFIG.head_dim * 4 * 12 * 4
    )  # Two bounds, two layers, twelve pages.
    assert kvjax.prefill(tiny.params(), tiny.CONFIG, everything, tiny.TOKENS).nbytes == dense.nbytes + pages
    assert jax.tree.leaves(cache)


def test_the_first_layers_read_everything():
    cache = kvjax.prefill(tiny.params(), tiny.CONFIG, policy(12, dense=1), tiny.TOKENS)
    assert hasattr(cache.layers[2], "low") and not hasattr(cache.layers[0], "low")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quest('64KiB')", "nothing is dropped"),
        ("quest(20)", "at least 3 pages"),
        ("quest(64, page=0)", "page is positive"),
        ("h2o(0.5) | quest(64)", "Evict at the end of the prompt"),
        ("quest(64) | kivi", "single tokens"),
        ("quest(64) | quest(128)", "Use one of the two"),
    ],
)
def test_refused(text, message):
    with pytest.raises(kvjax.PolicyError, match=message):
        kvjax.parse_policy(text)


def test_a_model_without_a_layer_left_is_refused():
    with pytest.raises(kvjax.PolicyError, match="this model has 2"):
        kvjax.plan(policy(64, dense=2), tiny.CONFIG, 48, jnp.float32)
