"""TidalDecode: several layers against its oracle, the authors' recorded output, and what makes it TidalDecode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.policies import attend_with
from tests import tiny
from tests.methods.layer import compress, spec, tokens
from tests.oracles import tidaldecode
from tests.oracles.test_golden import golden, reading_inputs

DIM, LAYERS, STEPS = 16, 6, 7
LENGTHS = (30, 17)
TOLERANCE = 2e-5  # float32 against float64.


def policy(budget, start=1, correction: int | None = 4) -> kvjax.Policy:
    return kvjax.policy("tidaldecode", budget, start=start, correction=correction)


@functools.cache
def layers():
    """Of each layer, of each row: q [4, T, D], k, v [2, T, D]."""
    rng = np.random.default_rng(0)
    draw = lambda heads, n: (1.5 * rng.normal(size=(heads, n + STEPS, DIM))).astype(np.float32)  # noqa: E731
    return [[(draw(4, n), draw(2, n), draw(2, n)) for n in LENGTHS] for _ in range(LAYERS)]


def prompts(made_by, about):
    caches = [
        compress(made_by, about, tokens(rows, 0, list(LENGTHS)), layer=i, layers=LAYERS)
        for i, rows in enumerate(layers())
    ]
    return [cache.reserve(STEPS) for cache in caches]


def chunk(rows, start: int, stop: int):
    """Tokens start..stop after the prompt of every row."""
    ahead = [tuple(x[:, n + start : n + stop] for x in row) for row, n in zip(rows, LENGTHS, strict=True)]
    pos = jnp.asarray(LENGTHS, jnp.int32)[:, None] + jnp.arange(start, stop)
    return dataclasses.replace(tokens(ahead, 0, stop - start), pos=pos)


@functools.partial(jax.jit, static_argnames=("made_by", "about"))
def through(made_by, about, caches, news):
    """One pass through all layers: outputs and caches, and what is left to hand on."""
    attend, shared, outputs, after = attend_with(made_by), None, [], []
    for cache, new in zip(caches, news, strict=True):
        out, cache, shared = attend(about, cache, new, shared)
        outputs, after = [*outputs, out], [*after, cache]
    return outputs, after, shared


@pytest.mark.parametrize("options", [{}, {"scale": 0.7, "softcap": 3.0}])
def test_decodes_like_its_oracle(options):
    """Ragged rows, grouped queries; one token after another, and all at once: each chooses for itself."""
    made_by, about = policy(6), spec(DIM, **options)
    start = prompts(made_by, about)
    caches, outputs = start, []
    for t in range(STEPS):
        out, caches, shared = through(made_by, about, caches, [chunk(rows, t, t + 1) for rows in layers()])
        assert shared is None  # Nothing is kept between passes.
        outputs.append(out)
    together, *_ = through(made_by, about, start, [chunk(rows, 0, STEPS) for rows in layers()])
    for row, length in enumerate(LENGTHS):
        mine = [rows[row] for rows in layers()]
        want = tidaldecode.tidal_decode(mine, prompt=length, top=6, start=1, correction=4, **options)
        for layer in range(LAYERS):
            found = np.concatenate([np.asarray(out[layer][row]) for out in outputs], 1)
            np.testing.assert_allclose(found, want[layer], atol=TOLERANCE)
            np.testing.assert_allclose(together[layer][row], want[layer], atol=TOLERANCE)


def test_a_ratio_is_of_what_each_row_holds():
    made_by = policy(0.5)
    out, *_ = through(made_by, spec(DIM), prompts(made_by, spec(DIM)), [chunk(rows, 0, 1) for rows in layers()])
    for row, length in enumerate(LENGTHS):
        mine = [tuple(x[:, : length + 1] for x in rows[row]) for rows in layers()]
        want = tidaldecode.tidal_decode(mine, prompt=length, top=(length + 1) // 2, start=1, correction=4)
        for layer in range(LAYERS):
            np.testing.assert_allclose(out[layer][row], want[layer], atol=TOLERANCE)


@pytest.mark.parametrize("top", [16, 64])
def test_authors(top):
    """The same tokens (100 %) and outputs in the selection, a sparse and the correction layer."""
    data = golden("quantization_reading/tidaldecode")
    q, k, v = reading_inputs()
    q = q * float(data["query_scale"])
    turned = k[::-1], v[::-1]  # Layers 3 and 9 of the record, asked with the query of token 254.
    made_by, about = policy(top, start=2, correction=9), spec(64)
    kept = {layer: (q[:, 255:], k, v) if layer == 2 else (q[:, 254:255], *turned) for layer in range(11)}
    held = [tokens([(q, *kept[layer][1:])], 0, 255) for layer in range(11)]
    caches = [compress(made_by, about, new, layer=i, layers=11).reserve(1) for i, new in enumerate(held)]
    news = [tokens([(kept[i][0], kept[i][1][:, 255:], kept[i][2][:, 255:])], 0, 1) for i in range(11)]
    news = [dataclasses.replace(new, pos=jnp.full((1, 1), 255)) for new in news]
    outputs, _, _ = through(made_by, about, caches, news)
    for layer, name in ((2, "selection"), (3, "sparse"), (9, "correction")):
        np.testing.assert_allclose(outputs[layer][0, :, 0], data[f"top{top}_{name}_layer_out"], rtol=1e-3, atol=2e-6)
    for layer, name in ((2, "mask"), (9, "corrected_mask")):
        _, _, (index, valid) = caches[layer].attend(news[layer], about)
        assert valid.all()
        mask = np.zeros((8, 256), bool)
        np.put_along_axis(mask, np.asarray(index)[0, :, 0], True, -1)
        np.testing.assert_array_equal(mask, data[f"top{top}_{name}"])


def test_only_the_chosen_tokens_are_read():
    """What else the following layers hold may be anything: it is not even multiplied by zero."""
    made_by = policy(6)
    caches, news = prompts(made_by, spec(DIM)), [chunk(rows, 0, 1) for rows in layers()]
    _, _, (index, _) = caches[1].attend(news[1], spec(DIM))
    chosen = np.zeros((2, 4, caches[2].inner.capacity), bool)
    np.put_along_axis(chosen, np.asarray(index)[:, :, 0], True, -1)
    chosen = chosen.reshape(2, 2, 2, -1).any(2)[..., None]
    assert not chosen.all()
    inner = caches[2].inner
    inner = dataclasses.replace(inner, k=jnp.where(chosen, inner.k, jnp.nan), v=jnp.where(chosen, inner.v, jnp.nan))
    want, *_ = through(made_by, spec(DIM), caches, news)
    caches[2] = dataclasses.replace(caches[2], inner=inner)
    found, *_ = through(made_by, spec(DIM), caches, news)
    np.testing.assert_array_equal(found[2], want[2])


def test_the_correction_layer_comes_nearer_to_full_attention():
    """Layers whose queries and keys drift: what was chosen early misses more and more."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.normal(size=(heads, 30 + STEPS, DIM)).astype(np.float32) for heads in (4, 2, 2))
    drift = lambda x, i: (x + 0.5 * i * rng.normal(size=x.shape)).astype(np.float32)  # noqa: E731
    drifting = [(drift(q, i), drift(k, i), v) for i in range(LAYERS)]
    full = tidaldecode.tidal_decode(drifting, prompt=30, top=30 + STEPS, start=1, correction=None)
    errors = [
        np.abs(tidaldecode.tidal_decode(drifting, prompt=30, top=6, start=1, correction=c)[5] - full[5]).mean()
        for c in (4, None)
    ]
    assert errors[0] < errors[1]


def test_a_budget_of_everything_is_full_attention_and_nothing_is_saved():
    full, everything = kvjax.policy("full"), policy(4096, start=0, correction=None)
    caches = [kvjax.prefill(tiny.params(), tiny.CONFIG, p, tiny.TOKENS) for p in (full, everything)]
    (want, _), (found, after) = (
        kvjax.extend(tiny.params(), tiny.CONFIG, cache.policy, cache, tiny.QUESTION) for cache in caches
    )
    np.testing.assert_allclose(found, want, atol=2e-5)
    assert caches[0].nbytes == caches[1].nbytes
    assert after.shared is None


def test_on_a_model_it_reads_less_and_rounded_tokens_too():
    """Generation in a compiled loop: what layers hand on lives within a step."""
    few = [
        kvjax.parse_policy(text)
        for text in ("tidaldecode(4, start=0, correction=None)", "tidaldecode(4, start=0, correction=None) | int8")
    ]
    full, _ = extended(kvjax.policy("full"))
    for made_by in few:
        logits, cache = extended(made_by)
        assert 1e-3 < np.abs(logits - full).max()
        out, count = kvjax.generate(
            tiny.params(), tiny.CONFIG, made_by, tiny.QUESTION[:, :2], cache=cache, max_new_tokens=3
        )
        assert out.shape == (4, 3) and (count == 3).all()
    np.testing.assert_allclose(extended(few[0])[0], extended(few[1])[0], atol=0.2)


@functools.cache
def extended(made_by):
    cache = kvjax.prefill(tiny.params(), tiny.CONFIG, made_by, tiny.TOKENS, tiny.LENGTHS)
    logits, cache = kvjax.extend(tiny.params(), tiny.CONFIG, made_by, cache, tiny.QUESTION)
    return np.asarray(logits), cache


def test_a_layer_that_follows_nobody_says_so():
    made_by = policy(6)
    with pytest.raises(ValueError, match="none has handed anything on"):
        prompts(made_by, spec(DIM))[2].attend(chunk(layers()[2], 0, 1), spec(DIM))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tidaldecode('64KiB')", "nothing is dropped"),
        ("tidaldecode(64, start=3, correction=2)", "correction comes after start=3"),
        ("tidaldecode(64, correction=1.5)", "between 0 and 1"),
        ("tidaldecode(64, start=-1)", "start is the number"),
        ("snapkv(0.5) | tidaldecode(64)", "must hold the same tokens"),
        ("tidaldecode(64) | kivi", "single tokens"),
        ("tidaldecode(64) | quest(64)", "Use one of the two"),
    ],
)
def test_refused(text, message):
    with pytest.raises(kvjax.PolicyError, match=message):
        kvjax.parse_policy(text)


def test_roles_of_layers():
    """In a model of 32 layers, layer 13 chooses anew as in the paper; in proportion in others."""

    def roles(layers, **parts):
        made_by = kvjax.policy("tidaldecode", 64, **parts)
        return [made_by.role(i, layers).read for i in range(layers)]

    choosing = lambda roles: [i for i, (does, _) in enumerate(roles) if does == "choose"]  # noqa: E731
    assert choosing(roles(32)) == [2, 13] and choosing(roles(6)) == [2, 3] and choosing(roles(4)) == [2]
    assert choosing(roles(32, correction=9)) == [2, 9] and choosing(roles(32, correction=None)) == [2]
    assert [does for does, _ in roles(5)] == ["all", "all", "choose", "follow", "follow"]
    assert [last for _, last in roles(5)] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("parts", "message"), [({"start": 1}, "Give a smaller start"), ({"start": 0}, "no full-attention layer 4")]
)
def test_a_model_without_the_layers_is_refused(parts, message):
    made_by = policy(64, **{"correction": 4 if parts["start"] == 0 else None, **parts})
    with pytest.raises(kvjax.PolicyError, match=message):
        kvjax.plan(made_by, tiny.CONFIG, 48, jnp.float32)
