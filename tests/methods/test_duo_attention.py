"""DuoAttention against its oracle and the recorded output of the authors' code; its gates are trained in
tests/training/test_duo.py."""

import dataclasses

import numpy as np
import pytest

import kvjax
from kvjax.cache import EMPTY, Slots
from kvjax.cache.types import tree_nbytes
from kvjax.evaluation.tasks import library_text
from kvjax.training.duo import save_gates
from tests import tiny
from tests.methods.layer import HEADS, KV_HEADS, compress, spec, step, tokens
from tests.oracles import duo_attention as oracle
from tests.oracles.test_golden import golden, reading_inputs

DIM, LENGTHS = 16, (30, 9)
GATES = ((0.1, 0.9), (0.8, 0.7), (0.2, 0.3))
RING = {"sinks": 2, "recent": 6}


def duo(gates=GATES, **changes) -> kvjax.Policy:
    return kvjax.policy("duo_attention", gates, **{**RING, **changes})


def rows(rng, lengths=LENGTHS, extra=0):
    return [tuple(rng.normal(size=(heads, n + extra, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS)) for n in lengths]


def held(layer, row: int) -> list[list[int]]:
    """Positions of each head, ascending."""
    pos = np.asarray(layer.pos)[row]
    return [sorted(head[head != EMPTY].tolist()) for head in np.broadcast_to(pos, (KV_HEADS, pos.shape[-1]))]


# The oracle


@pytest.mark.parametrize("layer", range(3))
def test_decoding_is_the_oracles(rng, layer):
    """One layer with a head of each kind, one of retrieval heads alone, one of streaming heads alone."""
    data, policy = rows(rng, extra=12), duo()
    keeps = oracle.retrieval_heads(np.array(GATES), 0.5)[layer]
    assert keeps.tolist() == [[False, True], [True, True], [False, False]][layer]
    cache = compress(policy, spec(DIM), tokens(data, 0, LENGTHS), layer=layer, layers=3).reserve(12)
    outputs = []
    for t in range(12):
        for row, n in enumerate(LENGTHS):
            want = oracle.duo_kept(keeps, n + t, **RING)
            assert held(cache, row) == [list(map(int, head)) for head in want]
        new = [tuple(x[:, n + t : n + t + 1] for x in row) for row, n in zip(data, LENGTHS, strict=True)]
        at = tokens(new, 0, 1)
        at = dataclasses.replace(at, pos=at.pos + np.array(LENGTHS)[:, None] + t)
        out, cache = step(policy, spec(DIM), cache, at)
        outputs.append(np.asarray(out)[:, :, 0])
    for row, (q, k, v) in enumerate(data):
        want = oracle.duo_decode(q, k, v, keeps, prompt=LENGTHS[row], **RING)
        np.testing.assert_allclose(np.stack(outputs, 2)[row], want, atol=1e-5)


def test_a_chunk_is_its_single_steps(rng):
    """Queries of a chunk do not see what the ring will have forgotten when they come."""
    data, policy = rows(rng, (30,), extra=12), duo()
    cache = compress(policy, spec(DIM), tokens(data, 0, 30), layer=0, layers=3).reserve(12)
    out, after = step(policy, spec(DIM), cache, tokens(data, 30, 42))
    keeps = oracle.retrieval_heads(np.array(GATES), 0.5)[0]
    np.testing.assert_allclose(out[0], oracle.duo_decode(*data[0], keeps, prompt=30, **RING), atol=1e-5)
    assert held(after, 0) == [list(map(int, head)) for head in oracle.duo_kept(keeps, 42, **RING)]


# The authors' code


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_heads_of_the_authors(sparsity):
    data = golden("quantization_reading/duo_attention")
    stage = duo(data["alpha_in"].tolist(), retrieval=1 - sparsity).stages[0]
    found = [stage.whole_heads(layer, 4) for layer in range(6)]
    np.testing.assert_array_equal(found, data[f"heads_sparsity{sparsity}"] == 1)


def test_streaming_rows_of_the_authors():
    """A prompt that is added token by token to an empty ring sees what their mask shows."""
    data = golden("quantization_reading/duo_attention")
    q, k, v = reading_inputs()
    q = q * float(data["query_scale"])
    policy = duo(((0.0,) * 4,), retrieval=0.0, sinks=16, recent=64)
    cache = compress(policy, spec(64), tokens([(q, k, v)], 0, 1)).reserve(255)
    out, _ = step(policy, spec(64), cache, tokens([(q, k, v)], 1, 256))
    rows = data["rows"][1:]
    np.testing.assert_allclose(
        np.asarray(out[0]).transpose(1, 0, 2)[rows - 1], data["streaming_out"][1:], rtol=1e-3, atol=1e-5
    )


# What makes it DuoAttention


def test_streaming_heads_take_constant_room():
    sizes = {}
    for length in (40, 80):
        text = np.tile(tiny.TOKENS, (1, 2))[:1, :length]
        cache = kvjax.prefill(tiny.params(), tiny.CONFIG, duo(GATES[:2]), text)
        sizes[length] = [tree_nbytes(cache.layers[i]) for i in (0, 2)]
    token = 2 * tiny.CONFIG.head_dim * 4
    # In each of the two layers one head retrieves: keys, values and positions of a single head grow.
    assert [b - a for a, b in zip(sizes[40], sizes[80], strict=True)] == [40 * (token + 4)] * 2


def test_layers_of_one_kind_are_plain():
    cache = kvjax.prefill(tiny.params(), tiny.CONFIG, duo(((1, 1), (0, 0))), tiny.TOKENS)
    assert all(isinstance(cache.layers[i], Slots) for i in (0, 2))
    assert [cache.layers[i].capacity for i in (0, 2)] == [48, 8]


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_an_even_pattern_has_the_wanted_sparsity(sparsity):
    stage = duo("even", retrieval=1 - sparsity).stages[0]
    for heads in (1, 2, 3, 8):
        found = np.array([stage.whole_heads(layer, heads) for layer in range(8)])
        assert found.mean() == pytest.approx(1 - sparsity, abs=1 / found.size)
    assert stage.slots(np.array([100, 4]), 2)[0].tolist() == [int(100 - 92 * sparsity), 4]


def test_of_equal_gates_the_first_retrieve():
    """Many gates end at zero or one, and the share of heads that was asked for is kept all the same."""
    gates = ((0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.3, 0.0))
    for retrieval in (0.125, 0.25, 0.5, 0.75, 1.0):
        stage = duo(gates, retrieval=retrieval).stages[0]
        found = np.array([stage.whole_heads(layer, 4) for layer in range(2)])
        np.testing.assert_array_equal(found, oracle.retrieval_heads(np.array(gates), 1 - retrieval))
        assert found.sum() == 8 * retrieval
    assert [duo(gates).stages[0].whole_heads(layer, 4) for layer in range(2)] == [
        (True, True, False, False),
        (True, False, True, False),
    ]


def test_the_house_models_gates_know_which_heads_retrieve():
    """A sixth of its heads keeps a number that is far behind; the sixth with the lowest gates does not."""
    model = kvjax.load("tiny")
    ring = {"sinks": 16, "recent": 64, "retrieval": 1 / 6}
    gates = kvjax.policy("duo_attention", "tiny", **ring).stages[0].gates
    opposite = [[1 - gate for gate in layer] for layer in gates]
    text = library_text()
    needle = "\nOne of the special magic numbers for Oslo is: 4071953.\n"
    question = (
        "\nWhat is the special magic number for Oslo mentioned in the provided text?\n"
        "The special magic number for Oslo mentioned in the provided text is: "
    )
    prompt = text[1000:1800] + needle + text[1800:3000]
    answers, sizes = [], []
    for policy in (
        kvjax.policy("full"),
        kvjax.policy("duo_attention", "tiny", **ring),
        kvjax.policy("duo_attention", opposite, **ring),
    ):
        cache = model.prefill(prompt, policy)
        answers.append(model.generate(question, cache=cache, max_new_tokens=7))
        sizes.append(cache.nbytes)
    assert [answer == "4071953" for answer in answers] == [True, True, False]
    assert max(sizes[1:]) < 0.4 * sizes[0] and sizes[1] == pytest.approx(sizes[2], rel=0.01)


# Gates, and bad input


def test_gates_from_a_file(tmp_path):
    save_gates(tmp_path / "gates.tsv", GATES)
    assert duo(str(tmp_path / "gates.tsv")) == duo()
    assert kvjax.parse_policy(f"duo_attention('{tmp_path}/gates.tsv', sinks=2, recent=6)") == duo()
    (tmp_path / "bad.tsv").write_text("0.5\tx\n")
    for name in ("bad.tsv", "missing.tsv"):
        with pytest.raises(kvjax.PolicyError, match="cannot read gates from"):
            duo(str(tmp_path / name))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"retrieval": 1.2}, "between 0 and 1"),
        ({"recent": 0}, "recent at least 1"),
        ({"gates": ()}, "finite numbers"),
        ({"gates": ((0.5, float("nan")),)}, "finite numbers"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(kvjax.PolicyError, match=message):
        duo(**{"gates": GATES, **changes})


def test_gates_of_another_model_are_refused():
    with pytest.raises(kvjax.PolicyError, match=r"for layers of \[2, 2, 2\] KV heads, and this model has 2 full"):
        kvjax.prefill(tiny.params(), tiny.CONFIG, duo(), tiny.TOKENS)
    with pytest.raises(kvjax.PolicyError, match="packs groups of tokens"):
        duo() | kvjax.policy("kivi")
