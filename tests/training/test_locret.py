"""The trainer of retaining heads: its targets and loss against the oracle, and that it learns what matters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.checkpoints.orbax import load_params, save_params
from kvjax.evaluation import make_task
from kvjax.training import TrainingError
from kvjax.training.locret import (
    Examples,
    causal_importance,
    init_retaining_heads,
    load_retaining_heads,
    retaining_loss,
    save_retaining_heads,
    train_retaining_heads,
    with_retaining_heads,
)
from tests import tiny
from tests.methods.layer import spec, tokens
from tests.oracles import locret

PROMPT, LENGTH = np.array([20, 13], np.int32), np.array([26, 15], np.int32)


def examples(seed: int = 0) -> Examples:
    """Random prompts; all answers begin alike, so that there is something to know of a prompt before they come."""
    drawn = np.random.default_rng(seed).integers(2, 128, (2, 26)).astype(np.int32)
    for row in range(2):
        drawn[row, PROMPT[row] : LENGTH[row]] = np.arange(10, 10 + LENGTH[row] - PROMPT[row])
    return Examples(jnp.asarray(drawn), jnp.asarray(PROMPT), jnp.asarray(LENGTH))


def test_targets_against_the_oracle(rng):
    """Rows with prompts and answers of their own length; tokens behind an answer have no say."""
    rows = [tuple(rng.normal(size=(n, 26, 8)) for n in (4, 2, 2)) for _ in range(2)]
    found = causal_importance(tokens(rows, 0, 26), spec(8), jnp.asarray(PROMPT), jnp.asarray(LENGTH), 8)
    for row, (q, k, _) in enumerate(rows):
        prompt, length = PROMPT[row], LENGTH[row]
        want = locret.causal_importance(q[:, prompt:length], k[:, :prompt])
        np.testing.assert_allclose(found[row, :, :prompt], want, atol=1e-5)


@pytest.mark.parametrize("row", [0, 1])
def test_loss_against_the_oracle(row):
    """On the tiny model, with the scores and targets that its own projections give, of both full-attention layers."""
    heads = init_retaining_heads(tiny.CONFIG, jax.random.key(1), hidden=8)
    batch = Examples(*(x[row : row + 1] for x in examples()))
    loss, metrics = jax.jit(functools.partial(retaining_loss, config=tiny.CONFIG, longest=8))(
        heads, tiny.params(), examples=batch
    )
    params = with_retaining_heads(tiny.params(), tiny.CONFIG, heads)
    needs = tiny.small("locret").needs
    prompt, length = int(PROMPT[row]), int(LENGTH[row])
    seen = kvjax.observe(
        params, tiny.CONFIG, batch.tokens[:, :length], needs=kvjax.policies.Needs(window=length - prompt) | needs
    )
    layers = [seen.layers[i] for i in tiny.CONFIG.full_layers]
    scores = np.stack([layer.tokenwise["locret"][0, :, :prompt] for layer, _ in layers])
    targets = [
        locret.causal_importance(np.asarray(obs.q[0]), np.asarray(layer.k[0, :, :prompt]), tiny.CONFIG.query_scale)
        for layer, obs in layers
    ]
    want = locret.retaining_loss(np.float64(scores), np.stack(targets))
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    np.testing.assert_allclose(
        metrics["fit"], locret.retaining_loss(np.float64(scores), np.stack(targets), 0), rtol=1e-4
    )


def test_rows_count_alike_and_alone():
    heads = init_retaining_heads(tiny.CONFIG, jax.random.key(1), hidden=8)

    def loss(batch):
        return retaining_loss(heads, tiny.params(), tiny.CONFIG, batch, longest=8)[0]

    batch = examples()
    alone = [loss(Examples(*(x[row : row + 1] for x in batch))) for row in range(2)]
    np.testing.assert_allclose(loss(batch), np.mean(alone), rtol=1e-5)
    padded = batch.tokens.at[1, LENGTH[1] :].set(5)
    np.testing.assert_allclose(loss(batch._replace(tokens=padded)), loss(batch), rtol=1e-6)


def test_nothing_flows_into_the_model():
    heads = init_retaining_heads(tiny.CONFIG, jax.random.key(1), hidden=8)
    gradients = jax.grad(lambda heads: retaining_loss(heads, tiny.params(), tiny.CONFIG, examples())[0])(heads)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    assert jax.tree.structure(gradients) == jax.tree.structure(heads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Heads after a short training, the loss of each logged step, and the folder."""
    folder = tmp_path_factory.mktemp("locret")
    heads = train_retaining_heads(
        tiny.params(),
        tiny.CONFIG,
        lambda i: examples(i % 20),
        folder,
        steps=60,
        hidden=32,
        rate=0.02,
        warmup=0.2,
        longest=8,
        every=30,
        log_every=1,
        show=False,
    )
    return heads, folder


def test_it_learns_which_tokens_will_matter(trained):
    """On prompts that it has not seen, more of the important tokens are among its own than before."""
    heads, folder = trained
    log = kvjax.training.read_log(folder)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"] and len(log) == 60
    evaluate = jax.jit(functools.partial(retaining_loss, config=tiny.CONFIG, longest=8))
    untrained = init_retaining_heads(tiny.CONFIG, jax.random.key(0), 32)
    before, after = (
        [evaluate(h, tiny.params(), examples=examples(100 + i))[1] for i in range(16)] for h in (untrained, heads)
    )

    def mean(metrics, name):
        return np.mean([m[name] for m in metrics])

    assert mean(after, "fit") < 0.5 * mean(before, "fit")
    # Chance has a tenth; a model of random weights lets tell little more.
    assert mean(after, "overlap") > 1.2 * mean(before, "overlap")


def test_a_trained_policy_keeps_what_the_answer_looks_at(trained):
    """More of the answer's attention than chance keeps, at the same bytes."""
    heads, _ = trained
    params = with_retaining_heads(tiny.params(), tiny.CONFIG, heads)
    caches = {
        name: kvjax.prefill(params, tiny.CONFIG, tiny.small(name, **changes), tiny.TOKENS, tiny.LENGTHS)
        for name, changes in (("locret", {"budget": 0.3, "phase": "prompt"}), ("random", {"budget": 0.3}))
    }
    assert caches["locret"].nbytes == caches["random"].nbytes
    full = kvjax.prefill(params, tiny.CONFIG, kvjax.policy("full"), tiny.TOKENS, tiny.LENGTHS)

    def distance(cache):
        want, found = (
            jax.nn.log_softmax(kvjax.extend(params, tiny.CONFIG, which.policy, which, tiny.QUESTION)[0])
            for which in (full, cache)
        )
        return float((jnp.exp(want) * (want - found)).sum(-1).mean())

    assert distance(caches["locret"]) < distance(caches["random"])


@pytest.mark.slow
def test_the_house_model_comes_with_heads_that_know_its_needles():
    """If this fails after the model was trained anew, its heads have to be as well: experiments/train_locret.py."""
    model = kvjax.load("tiny")
    samples = make_task("needle", context=300, count=4, seed=5).samples(model)
    assert len({len(sample.question_ids) + len(sample.answers[0]) for sample in samples}) == 1
    rows = jnp.asarray([[*s.context_ids, *s.question_ids, *s.answers[0]] for s in samples], jnp.int32)
    batch = Examples(rows, jnp.full(4, 300, jnp.int32), jnp.full(4, rows.shape[1], jnp.int32))
    evaluate = jax.jit(functools.partial(retaining_loss, config=model.config))
    shipped = tuple(layer["trained"]["locret"] for layer in model.params["layers"])
    found = evaluate(shipped, model.params, examples=batch)[1]
    other = evaluate(shipped[1:] + shipped[:1], model.params, examples=batch)[1]  # Of another layer.
    assert found["overlap"] > 0.2 and found["fit"] < 0.5 * other["fit"]


def test_heads_survive_the_disk_alone_and_with_their_model(trained, tmp_path):
    heads, folder = trained
    save_retaining_heads(tmp_path / "heads", heads)
    tiny.assert_trees_equal(load_retaining_heads(tmp_path / "heads"), heads)
    params = with_retaining_heads(tiny.params(), tiny.CONFIG, heads)
    save_params(tmp_path / "model", params, tiny.CONFIG)
    tiny.assert_trees_equal(load_params(tmp_path / "model")[0], params)
    # A finished run gives its heads again at once.
    again = train_retaining_heads(
        tiny.params(), tiny.CONFIG, lambda i: 1 / 0, folder, steps=60, hidden=32, rate=0.02, warmup=0.2, longest=8
    )
    tiny.assert_trees_equal(again, heads)
    with pytest.raises(TrainingError, match="was trained with"):
        train_retaining_heads(tiny.params(), tiny.CONFIG, lambda i: 1 / 0, folder, steps=60, hidden=32)


def test_stacked_parameters_get_heads_too():
    """As on accelerators; other trained parameters stay."""
    heads = init_retaining_heads(tiny.CONFIG, jax.random.key(1), hidden=8)
    stacked = kvjax.models.params.stack_layers(tiny.params(), tiny.CONFIG)
    found = with_retaining_heads(stacked, tiny.CONFIG, heads)
    tiny.assert_trees_equal(found["layers"][2]["trained"]["locret"], heads[1])
    layers = list(tiny.params()["layers"])
    layers[0] = {**layers[0], "trained": {"other": jnp.ones(2)}}
    found = with_retaining_heads({**tiny.params(), "layers": tuple(layers)}, tiny.CONFIG, heads)
    assert found["layers"][0]["trained"].keys() == {"other", "locret"} and "trained" not in found["layers"][1]
