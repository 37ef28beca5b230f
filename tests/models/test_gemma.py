"""Gemma 3 270M against PyTorch.

`tests/data/gemma3_270m.npz` holds what transformers 5.23 computed in float32 on a CPU from the same packaged file:
three short prompts, one of 1,200 tokens (beyond the sliding window), and 4,096 tokens of text for the perplexity.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.kernels.prefill import causal_attention
from kvjax.models.transformer import embed, layer_spec, positions, rms_norm, run_layer, unembed

LOGIT_ERROR = 2e-3  # Measured: 3e-5.
STATE_ERROR = 2e-4  # Of the largest number of a layer's hidden state, key or value.
MARGIN = 1e-2  # Between the two likeliest tokens: below it another order of sums may choose the other one.
SHORT = 64  # The three short prompts share a batch of this length.


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "data" / "gemma3_270m.npz") as file:
        return {name: file[name] for name in file.files}


@functools.partial(jax.jit, static_argnames=("config", "spec"))
def one_layer(weights, config, spec, x, pos):
    """A layer's output, keys and values."""

    def attend(spec, state, new, shared):
        out, _ = causal_attention(new.q, new.k, new.v, new.pos, scale=spec.scale, window=spec.window)
        return out, (new.k, new.v), shared

    return run_layer(weights, config, spec, x, pos, None, None, attend)[:2]


def run(model, tokens, lengths):
    """Hidden states after the embedding and after every layer [B, T, hidden], and the layers' keys and values."""
    pos = positions(tokens, lengths)
    states, kept = [embed(model.params, model.config, tokens)], []
    for i, weights in enumerate(model.params["layers"]):
        x, kv = one_layer(weights, model.config, layer_spec(model.config, i), states[-1], pos)
        states.append(x)
        kept.append(kv)
    return states, kept


logits_of = jax.jit(unembed, static_argnames="config")


@pytest.fixture(scope="module", params=["short", "long"])
def prompts(request, gemma, recorded):
    """Names, lengths, hidden states and keys and values of a batch of prompts."""
    names = ["p0", "p1", "p2"] if request.param == "short" else ["p3"]
    rows = [recorded[f"{name}_ids"] for name in names]
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), SHORT if len(rows) > 1 else max(lengths)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return names, lengths, run(gemma, jnp.asarray(tokens), jnp.asarray(lengths))


@pytest.mark.optimized
def test_logits(gemma, recorded, prompts):
    names, lengths, (states, _) = prompts
    for row, name in enumerate(names):
        pos = recorded[f"{name}_pos"]
        logits = np.asarray(logits_of(gemma.params, gemma.config, states[-1][row][pos]))
        top = recorded[f"{name}_top20_ids"]
        assert np.abs(np.take_along_axis(logits, top, -1) - recorded[f"{name}_top20_logits"]).max() < LOGIT_ERROR
        # No other token is likelier than those twenty.
        assert (np.sort(logits, -1)[:, -20] > recorded[f"{name}_top20_logits"].min(-1) - LOGIT_ERROR).all()
        assert (np.sort(logits, -1)[:, -21] < recorded[f"{name}_top20_logits"].min(-1) + LOGIT_ERROR).all()
        lse = np.asarray(jax.nn.logsumexp(jnp.asarray(logits), axis=-1))
        assert np.abs(lse - recorded[f"{name}_lse"]).max() < LOGIT_ERROR
        if pos[-1] == lengths[row] - 1:
            assert np.abs(logits[-1, ::64] - recorded[f"{name}_final_stride64"]).max() < LOGIT_ERROR


@pytest.mark.optimized
def test_hidden_states_of_every_layer(gemma, recorded, prompts):
    names, lengths, (states, _) = prompts
    for row, name in enumerate(names):
        found = [x[row, lengths[row] - 1] for x in states]
        found[-1] = rms_norm(found[-1], gemma.params["final_norm"], gemma.config)
        for layer, (x, want) in enumerate(zip(found, recorded[f"{name}_hidden_last"], strict=True)):
            assert np.abs(np.asarray(x) - want).max() < STATE_ERROR * np.abs(want).max(), f"after {layer} layers"


@pytest.mark.optimized
def test_keys_and_values_of_every_layer(recorded, prompts):
    names, lengths, (_, kept) = prompts
    for row, name in enumerate(names):
        if f"{name}_k_last" not in recorded:
            continue
        for layer, kv in enumerate(kept):
            for x, which in zip(kv, "kv", strict=True):
                want = recorded[f"{name}_{which}_last"][layer]
                found = np.asarray(x[row, 0, lengths[row] - 1])
                assert np.abs(found - want).max() < STATE_ERROR * np.abs(want).max(), f"{which} of layer {layer}"


@functools.partial(jax.jit, static_argnames="config")
def nll(params, config, x, target):
    """Negative log-likelihood of target [T] after hidden states x [T, hidden]."""
    logits = unembed(params, config, x)
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, target[:, None], -1)[:, 0]


@pytest.mark.slow
@pytest.mark.optimized
def test_perplexity(gemma, recorded):
    ids = jnp.asarray(recorded["ppl_ids"])[None]
    states, _ = run(gemma, ids, None)

    size = 256  # A vocabulary of 262,144: all logits at once would take 4 GiB.
    x, target = states[-1][0], jnp.pad(ids[0, 1:], (0, 1))
    pieces = [
        nll(gemma.params, gemma.config, x[i : i + size], target[i : i + size]) for i in range(0, len(target), size)
    ]
    found = np.concatenate([np.asarray(piece) for piece in pieces])[:-1]
    assert np.abs(found - recorded["ppl_token_nll"]).max() < LOGIT_ERROR
    perplexity, want = np.exp(found.mean(dtype=np.float64)), np.exp(float(recorded["ppl_mean_nll"]))
    assert abs(perplexity / want - 1) < 1e-3
    assert want == pytest.approx(11.07, abs=0.01)


@pytest.mark.parametrize("names", [("p0", "p1", "p2"), ("p3",)], ids=["short", "long"])
def test_greedy_continuations(gemma, recorded, names):
    """Prefill, cache and decoding as users run them."""
    prompts = [recorded[f"{name}_ids"].tolist() for name in names]
    found = gemma.generate(prompts, max_new_tokens=32, stop=())
    for row, name in zip(found, names, strict=True):
        want, margin = recorded[f"{name}_greedy32"], recorded[f"{name}_greedy32_margin"]
        for t in range(32):
            if row[t] != want[t]:
                assert margin[t] < MARGIN, f"{name}, token {t}: {row[t]} instead of {want[t]}"
                break  # Two texts from here on.
