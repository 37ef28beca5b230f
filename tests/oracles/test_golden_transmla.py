"""The oracle of TransMLA against the recorded output of the authors' code."""

import numpy as np
import pytest

from tests.oracles import transmla
from tests.oracles.test_golden import close, golden

DIM, KV_HEADS = 16, 2


def layer() -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Calibration inputs [2, 40, 64], weights, unrotated keys of all inputs [80, 2, 16]."""
    data = golden("quantization_reading/transmla")
    weights = {name: data[f"in_{name}_proj"].astype(np.float64) for name in "qkvo"}
    x = data["x"].astype(np.float64)
    return x, weights, (x @ weights["k"].T).reshape(-1, KV_HEADS, DIM)


@pytest.mark.parametrize(
    "tag, freqfold, collapse, rope_dim, rank",
    [("ff1_c1_mqa16_r24", 1, 1, 16, 24), ("ff2_c2_mqa8_r24", 2, 2, 8, 24), ("ff4_c2_mqa8_r16", 4, 2, 8, 16)],
)
def test_transmla(tag, freqfold, collapse, rope_dim, rank):
    data, (x, weights, keys) = golden("quantization_reading/transmla"), layer()
    matrix = transmla.concentration(keys, freqfold=freqfold, collapse=collapse)
    turned, values = keys.reshape(len(keys), -1) @ matrix, x.reshape(-1, 64) @ weights["v"].T
    close((turned**2).mean(0), data[f"{tag}_k_energy"])
    # The sign of an eigenvector is arbitrary, and the same for both channels of a pair.
    close(np.abs(matrix.T @ weights["k"]), np.abs(data[f"{tag}_rot_k_proj"]), rtol=1e-4, atol=1e-5)

    shape = {"rope_dim": rope_dim, "dim": DIM, "collapse": collapse}
    close(transmla.partial_rope(x[0], weights, matrix, **shape), data[f"{tag}_y_partial_rope"][0], atol=2e-6)

    encode, decode = transmla.joint_pca(turned, values, rope_dim=rope_dim, rank=rank)
    out = transmla.latent_attention(x[0], weights, matrix, encode, decode, **shape)
    close(out, data[f"{tag}_y_mla"][0], atol=2e-6)
    # Two heads' keys and values as the latent gives them back, per unit of input: 16 rows of keys, 16 of values.
    down = encode.T @ np.concatenate([(matrix.T @ weights["k"])[rope_dim:], weights["v"]])
    nope = KV_HEADS * DIM - rope_dim
    up = np.concatenate([matrix[:DIM, rope_dim:] @ decode[:, :nope].T, decode[:, nope:].T[:DIM]])
    close(up @ down, data[f"{tag}_kvb_kva"], atol=1e-6)


def test_all_channels_rotating_change_nothing():
    data, (x, weights, keys) = golden("quantization_reading/transmla"), layer()
    matrix = transmla.concentration(keys)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(32), atol=1e-12)
    every = {"rope_dim": KV_HEADS * DIM, "dim": DIM}
    out = transmla.partial_rope(x[0], weights, matrix, **every)
    close(out, data["y_original"][0], atol=2e-6)
    close(data["ff1_rope_all_heads_y"][0], data["y_original"][0], atol=2e-6)
    values = x.reshape(-1, 64) @ weights["v"].T
    encode, decode = transmla.joint_pca(values, values, rope_dim=32, rank=32, balance=None)
    np.testing.assert_allclose(transmla.latent_attention(x[0], weights, matrix, encode, decode, **every), out)
