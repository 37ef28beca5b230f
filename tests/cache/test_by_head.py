"""Heads of different kinds side by side: each group does what it would do alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import EMPTY, LayerSpec, Slots, Tokens, make_ring
from kvjax.cache.by_head import ByHead, of_heads

GROUP, DIM, LENGTH = 2, 8, 14
SPEC = LayerSpec(scale=0.5)


def draw(heads: int, length: int, start: int = 0, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    make = lambda n: jnp.asarray(rng.normal(size=(2, n, length, DIM)), jnp.float32)  # noqa: E731
    q, k = make(heads * GROUP), make(heads)
    pos = jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), (2, length))
    return Tokens(q=q, k=k, v=make(heads), q_raw=q, k_raw=k, pos=pos)


def full(new: Tokens) -> Slots:
    return Slots(k=new.k, v=new.v, pos=new.pos[:, None])


def ring(new: Tokens) -> Slots:
    return make_ring(new.k, new.v, new.pos, 6, sinks=2)


def build(heads) -> tuple[ByHead, Tokens]:
    new = draw(4, LENGTH)
    kinds = (full, ring)
    groups = tuple(kind(of_heads(new, mine)) for kind, mine in zip(kinds, heads, strict=True))
    return ByHead(groups=groups, heads=heads).reserve(5), new


@pytest.mark.parametrize("heads", [((0, 1), (2, 3)), ((3, 1), (0, 2)), ((2,), (0, 1, 3))])
@pytest.mark.parametrize("length", [1, 5])
def test_each_group_is_what_it_would_be_alone(heads, length):
    layer, _ = build(heads)
    new = draw(4, length, LENGTH, seed=1)
    attend = jax.jit(lambda layer, new: layer.attend(new, SPEC))
    out, after, _ = attend(layer, new)
    for group, later, mine in zip(layer.groups, after.groups, heads, strict=True):
        want, alone, _ = attend(group, of_heads(new, mine))
        queries = [h * GROUP + g for h in mine for g in range(GROUP)]
        np.testing.assert_allclose(out[:, jnp.array(queries)], want, atol=1e-5)
        for x, y in zip(jax.tree.leaves(later), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(x, y)


def test_heads_hold_different_numbers_of_tokens():
    layer, new = build(((3, 1), (0, 2)))
    pos, k, v = layer.held(SPEC)
    np.testing.assert_array_equal((layer.pos != EMPTY).sum(-1), [[6, 14, 6, 14]] * 2)
    np.testing.assert_array_equal(pos, layer.pos)
    for head, want in ((0, [0, 1, 10, 11, 12, 13]), (1, range(14)), (2, [0, 1, 10, 11, 12, 13]), (3, range(14))):
        order = np.argsort(np.where(pos[0, head] == EMPTY, 99, pos[0, head]))[: len(want)]
        np.testing.assert_array_equal(pos[0, head][order], want)
        np.testing.assert_array_equal(k[0, head][order], new.k[0, head][jnp.array(want)])
        np.testing.assert_array_equal(v[0, head][order], new.v[0, head][jnp.array(want)])


def test_only_the_group_that_grows_needs_room():
    layer, new = build(((0, 1), (2, 3)))
    np.testing.assert_array_equal(layer.room, 5)
    after = layer.append(draw(4, 5, LENGTH)).reserve(3)
    np.testing.assert_array_equal(after.room, 3)
    assert after.groups[1].capacity == 6
    assert ByHead(groups=(ring(new),), heads=((0, 1, 2, 3),)).room is None
