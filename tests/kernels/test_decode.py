"""Decode attention: the XLA path and the dispatch, against the dense reference."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from kvjax.kernels import KernelError, Vectors, choose, decode_attention, tuning
from kvjax.kernels.decode import explain, reference, xla
from tests.kernels.stores import KINDS, check, example, make_store, normal, poison

B, H = 2, 2


def test_vectors_in_blocks_are_the_vectors(rng):
    for kind in KINDS:
        stored = make_store(rng, kind, (B, H, 192, 64))
        np.testing.assert_array_equal(stored.block(64, 64).decode(), stored.decode()[:, :, 64:128])


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_xla_equals_reference(rng, kind, dim):
    request = example(rng, kind, dim)
    check(xla.decode(request, block=64), reference.decode(request))


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_every_option_at_once(rng, rows):
    request = example(rng, "4-bit tokens", 64, rows=rows, options=True)
    check(xla.decode(request, block=64), reference.decode(request))


def test_unused_slots_and_invisible_ones_may_hold_anything(rng):
    for kind in KINDS:
        request = example(rng, kind, 64)
        dirty = dataclasses.replace(request, k=poison(request.k, 150), v=poison(request.v, 150))
        clean, found = reference.decode(request), xla.decode(dirty, block=64)
        np.testing.assert_array_equal(reference.decode(dirty).out, clean.out)
        check(found, clean)


def test_a_tail_without_a_store_and_a_store_without_a_tail(rng):
    request = example(rng, "float32", 64, options=True)
    empty = jax.tree.map(lambda x: x[:, :, :0], request.k)
    nothing = dataclasses.replace(
        request, k=empty, v=empty, bias=None, pos=request.pos[..., :0], lengths=request.lengths * 0
    )
    check(xla.decode(nothing), reference.decode(nothing))
    alone = dataclasses.replace(request, tail=None)
    check(xla.decode(alone), reference.decode(alone))


def test_latent_values_are_the_end_of_the_keys(rng):
    request = dataclasses.replace(example(rng, "float32", 96), v=None, latent=64)
    check(xla.decode(request, block=64), reference.decode(request))
    np.testing.assert_allclose(
        reference.decode(request).out,
        reference.decode(dataclasses.replace(request, v=Vectors(codes=request.k.codes[..., 32:]), latent=0)).out,
    )


def test_a_row_that_sees_nothing_is_zero(rng):
    request = example(rng, "float32", 64)
    part = xla.decode(dataclasses.replace(request, lengths=request.lengths * 0))
    assert (part.out == 0).all() and (part.lse < -1e29).all()


def test_sinks_take_their_share_of_the_softmax(rng):
    q, k = normal(rng, (1, 2, 1, 64)), normal(rng, (1, 1, 5, 64))
    sinks = jnp.asarray([0.5, -1.0])
    part = decode_attention(q, k, k, sinks=sinks)
    logits = np.concatenate([np.asarray(q)[0, :, 0] @ np.asarray(k)[0, 0].T, np.asarray(sinks)[:, None]], 1)
    weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(part.out[0, 0], weights[:, :5] @ np.asarray(k)[0, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(part.lse[0, 0], np.log(np.exp(logits).sum(1)), rtol=1e-6)


def test_nothing_of_the_cache_is_decoded_as_a_whole(rng):
    request = example(rng, "2-bit tokens", 128, slots=16_384)
    memory = jax.jit(xla.decode).lower(request).compile().memory_analysis()
    dense = 4 * B * H * 16_384 * 128
    assert memory.temp_size_in_bytes < dense / 8, (memory.temp_size_in_bytes, dense)


def test_what_does_not_fit_is_named(rng):
    q, k = normal(rng, (1, 4, 1, 64)), normal(rng, (1, 2, 32, 64))
    for message, arguments in {
        "multiple of their 2 heads": (q[:, :3], k, k),
        "k must be": (q[..., :32], k, k),
        "v must be": (q, k, k[:, :, :8]),
        "latent says": (q, k, None),
    }.items():
        with pytest.raises(KernelError, match=message):
            decode_attention(*arguments)
    with pytest.raises(KernelError, match="positions of the slots"):
        decode_attention(q, k, k, window=8)
    with pytest.raises(KernelError, match="q_pos is needed"):
        decode_attention(q, k, k, pos=jnp.zeros((1, 1, 32), jnp.int32))
    with pytest.raises(KernelError, match="4 query heads"):
        decode_attention(q, k, k, sinks=jnp.zeros(3))
    with pytest.raises(KernelError, match="divisor"):
        decode_attention(q, Vectors(codes=k, scale=jnp.ones((1, 2, 5, 64))), k)
    with pytest.raises(KernelError, match="int32 words"):
        decode_attention(q, Vectors(codes=k[..., :8], scale=jnp.ones((1, 2, 32, 1)), bits=4), k)


def test_lengths_out_of_range_are_clipped_and_told_in_debug_mode(rng):
    q, k = normal(rng, (1, 2, 1, 64)), normal(rng, (1, 2, 32, 64))
    run = jax.jit(lambda lengths: decode_attention(q, k, k, lengths).out)
    np.testing.assert_array_equal(run(jnp.asarray([99])), run(jnp.asarray([32])))
    checked = checkify.checkify(run, errors=checkify.user_checks)
    assert checked(jnp.asarray([32]))[0].get() is None
    assert "32 slots" in checked(jnp.asarray([99]))[0].get()


def test_auto_says_what_it_chose_and_an_explicit_choice_never_falls_back(rng, monkeypatch):
    request = example(rng, "float32", 64)
    assert explain(request) == choose.Choice("xla", "there is no Pallas kernel for cpu")
    assert explain(request, "reference").implementation == "reference"
    with pytest.raises(KernelError, match="must be one of"):
        explain(request, "cuda")  # type: ignore[arg-type]
    refuse = {"tpu": lambda: "Nothing will do."}
    with pytest.raises(KernelError, match="Nothing will do.*'xla' can"):
        choose.choose("tpu", refuse)
    monkeypatch.setattr(choose.jax, "default_backend", lambda: "tpu")
    assert choose.choose("auto", refuse) == choose.Choice("xla", "Nothing will do.")
    assert choose.choose("auto", {"tpu": lambda: None}).implementation == "tpu"


def test_tuned_options_come_from_the_nearest_measured_shape(tmp_path, monkeypatch):
    entry = {"kernel": "decode", "kind": "int8", "dim": 128, "rows": 8}
    entries = [
        entry | {"slots": 4096, "options": {"block": 512}},
        entry | {"slots": 131072, "options": {"block": 2048}},
    ]
    tuning.write_table(tmp_path / tuning.file_name("TPU v9"), {"device": "TPU v9"}, entries)
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path))
    usual = {"kind": "int8", "dim": 128, "rows": 4}

    def tuned(**shape):
        return tuning.tuned("decode", tuning.Shape(**usual | shape), "TPU v9")

    assert tuned(slots=8192) == {"block": 512}
    assert tuned(slots=100_000) == {"block": 2048}
    assert tuned(slots=511) == {}, "no block has more slots than there are"
    assert tuned(slots=8192, dim=64) == {} and tuned(slots=8192, kind="bfloat16") == {}
    (tmp_path / tuning.file_name("TPU v8")).write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="tpu_v8.json is no table"):
        tuning.tuned("decode", tuning.Shape("int8", 128, 4, 8192), "TPU v8")


def test_shapes_are_named_by_what_decides_speed(rng):
    assert tuning.shape(example(rng, "int8", 64)) == tuning.Shape("int8", 64, 3, 200)
    assert tuning.shape(example(rng, "2-bit tokens", 64)).kind == "2-bit/32 tokens"
    assert tuning.kind(None) == "latent"
