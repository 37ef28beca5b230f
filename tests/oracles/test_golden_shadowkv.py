"""ShadowKV's oracle against the recorded output of the authors' code (bytedance/ShadowKV a21f5a9, `ShadowKVCache`).

Keys of the inputs are those before rotation; 252 tokens, chunks of 8, rank 32, 6 chunks per step, 2 local and 4 outlier
chunks. The query is that of token 250, rotated at position 252.
"""

import numpy as np

from tests.oracles import shadowkv
from tests.oracles.attention import attention, rope
from tests.oracles.test_golden import close, golden, reading_inputs, same_tokens

PROMPT, CHUNK = 252, 8
SETTING = {"chunk": CHUNK, "local": 2, "outliers": 4}


def prompt():
    """q [8, 1, 64] rotated at 252, k_raw, v [4, 252, 64]."""
    q, k_raw, v = reading_inputs()
    return rope(q[:, 250:251], np.array([PROMPT])), k_raw[:, :PROMPT], v[:, :PROMPT]


def cut():
    return shadowkv.cut(rope(prompt()[1], np.arange(PROMPT)), **SETTING)


def test_low_rank_keys():
    data = golden("quantization_reading/shadowkv")
    _, k_raw, _ = prompt()
    u, sv = shadowkv.low_rank_keys(k_raw, 32)
    close(u[None] @ sv[:1], data["lowrank_key_h0"][0], rtol=1e-4, atol=1e-4)
    close(np.linalg.norm(u @ sv - k_raw, axis=-1), data["lowrank_err_norm"][0], rtol=1e-4)
    close(np.linalg.norm(u, axis=0), data["U_col_norm"][0], rtol=1e-4)
    close(np.linalg.norm(sv, axis=-1), data["SV_row_norm"][0], rtol=1e-4)


def test_landmarks_and_outliers():
    data, chunks = golden("quantization_reading/shadowkv"), cut()
    assert [chunks.number, chunks.local] == data["num_chunks"].tolist()
    np.testing.assert_array_equal(chunks.outlier, data["outlier_chunk_mask"][0])
    np.testing.assert_array_equal(chunks.ids, data["landmark_chunk_idx"][0])
    close(chunks.landmarks, data["landmarks"][0], rtol=1e-4, atol=1e-5)


def test_chosen_chunks():
    """In the authors' order, best first, with their sqrt(128)."""
    data, (q, *_) = golden("quantization_reading/shadowkv"), prompt()
    close(q, data["query_roped"][0], rtol=1e-4, atol=1e-5)
    chosen = shadowkv.choose(q[:, 0], cut(), 6, scale=128**-0.5)
    np.testing.assert_array_equal(chosen, data["selected_chunks"][0])
    np.testing.assert_array_equal(shadowkv.positions_of(chosen), data["position_ids"][0])


def test_what_a_step_reads():
    """The authors' buffers [local | outliers by cosine | retrieved] of head 0."""
    data, (_, k_raw, v), chunks = golden("quantization_reading/shadowkv"), prompt(), cut()
    local, start, end = data["buffer_layout"]
    k = rope(k_raw, np.arange(PROMPT))
    outliers = np.argsort(chunks.cosine[0])[:4]
    exact = [*range(PROMPT - local, PROMPT), *shadowkv.positions_of(outliers[None], CHUNK)[0]]
    close(k[0, exact], data["key_buffer_h0"][0, 0, :start], rtol=1e-4, atol=1e-5)
    sparse = data["position_ids"][0, 0]
    u, sv = shadowkv.low_rank_keys(k_raw, 32)
    close(rope(u @ sv[0], np.arange(PROMPT))[sparse], data["key_buffer_h0"][0, 0, start:end], rtol=1e-4, atol=1e-4)
    close(v[0, [*exact, *sparse]], data["value_buffer_h0"][0, 0], rtol=1e-6)


def test_a_step_is_attention_over_those_buffers():
    """Beside the query's own token."""
    data, (q, *_) = golden("quantization_reading/shadowkv"), prompt()
    q_all, k_all, v_all = reading_inputs()
    q_all = np.concatenate([rope(q_all[:, :PROMPT], np.arange(PROMPT)), q], axis=1)
    k_all, v_all = k_all[:, : PROMPT + 1], v_all[:, : PROMPT + 1]
    out, read = shadowkv.shadowkv_decode(
        q_all, k_all, v_all, prompt=PROMPT, number=6, rank=32, landmark_scale=128**-0.5, **SETTING
    )
    same_tokens(np.sort(read[0], -1), data["selected_chunks"][0])
    own = rope(k_all[:, PROMPT:], np.array([PROMPT]))
    keys = np.concatenate([data["key_buffer_h0"][0], own[:1]], axis=1)
    values = np.concatenate([data["value_buffer_h0"][0], v_all[:1, PROMPT:]], axis=1)
    close(out[:2], attention(q[:2], keys, values), rtol=1e-3, atol=1e-5)


def test_everything_at_full_rank_is_full_attention(rng):
    q, k_raw, v = (rng.normal(size=(heads, 40, 8)) for heads in (4, 2, 2))
    out, _ = shadowkv.shadowkv_decode(q, k_raw, v, prompt=36, number=9, rank=16, chunk=4, local=1, outliers=1)
    close(out, attention(q[:, 36:], rope(k_raw, np.arange(40)), v))


def test_a_short_prompt_is_kept_exactly(rng):
    q, k_raw, v = (rng.normal(size=(heads, 14, 8)) for heads in (4, 2, 2))
    out, read = shadowkv.shadowkv_decode(q, k_raw, v, prompt=11, number=2, rank=1, chunk=4, local=4, outliers=2)
    assert read[0].shape == (2, 0)
    close(out, attention(q[:, 11:], rope(k_raw, np.arange(14)), v))
