"""Arrays in the host's memory. A CPU has that memory space too, so all but the link is tested here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache import memory_nbytes
from kvjax.cache.host import HOST, fetch, on_host, take_rows, to_device, to_host
from kvjax.checkpoints.orbax import load_cache, load_pytree, save_cache, save_pytree
from tests import tiny

X = jnp.arange(2 * 3 * 5 * 2 * 4, dtype=jnp.float32).reshape(2, 3, 5, 2, 4)
INDEX = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 3, 4)), jnp.int32)


def there(x):
    return jax.device_put(x, HOST)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("place", [lambda x: x, there], ids=["device", "host"])
def test_fetch_takes_entries_to_the_device(place, jit):
    found = (jax.jit(fetch) if jit else fetch)(place(X), INDEX)
    assert not on_host(found) and found.sharding.memory_kind == "device"
    np.testing.assert_array_equal(found, np.take_along_axis(np.asarray(X), np.asarray(INDEX)[..., None, None], 2))


def test_only_the_gather_runs_on_the_host():
    text = jax.jit(fetch).lower(there(X), INDEX).as_text()
    assert text.count("_xla_compute_type") >= 1 and "device_host" not in text.replace("pinned_host", "")
    assert "_xla_compute_type" not in jax.jit(fetch).lower(X, INDEX).as_text()


def test_fetch_in_a_loop_whose_state_holds_the_array():
    """As in decoding: the state is donated, and the array stays where it is."""

    @jax.jit
    def loop(x):
        def body(state):
            i, x, total = state
            return i + 1, x, total + fetch(x, (INDEX + i) % 5)

        return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, x, jnp.zeros((2, 3, 4, 2, 4))))[1:]

    x, total = jax.jit(loop, donate_argnums=0)(there(X))
    assert on_host(x) and not on_host(total)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(total, loop(X)[1])


def test_rows_stay_in_their_memory():
    for index in (slice(1, 2), jnp.asarray([1, 0, 1])):
        for place in (there, lambda x: x):
            found = take_rows(place(X), index)
            assert on_host(found) == on_host(place(X))
            np.testing.assert_array_equal(found, np.asarray(X)[index])


def test_on_a_cpu_arrays_stay_as_they_are():
    assert to_host(X) is X and to_device(X) is X and not on_host(np.zeros(2))
    assert not on_host(to_device(there(X)))


def test_bytes_by_memory():
    assert memory_nbytes({"a": X, "b": there(X), "c": (X[:1],)}) == {
        "device": X.nbytes * 3 // 2,
        "pinned_host": X.nbytes,
    }


def test_from_disk_it_goes_back_to_the_host(tmp_path):
    save_pytree(tmp_path / "x", {"far": there(X), "near": X})
    back = load_pytree(tmp_path / "x")
    assert on_host(back["far"]) and not on_host(back["near"])
    np.testing.assert_array_equal(back["far"], X)


def test_a_cache_with_a_host_tier(tmp_path):
    """Rows, repetition, the disk, and decoding, with values in the host's memory: the same bits, at the same place."""
    policy = tiny.small("shadowkv")
    cache = kvjax.prefill(tiny.params(), tiny.CONFIG, policy, tiny.TOKENS, tiny.LENGTHS)

    def far(cache):
        return [layer.tiers[0].v for layer in tiny.full_layers(cache)]

    def offloaded(cache):
        values = {id(v) for v in far(cache)}
        return jax.tree.map(lambda leaf: there(leaf) if id(leaf) in values else leaf, cache)

    host = offloaded(cache)
    assert memory_nbytes(host)["pinned_host"] == sum(v.nbytes for v in far(cache)) > 0.2 * host.nbytes
    order = [2, 0, 0, 1]
    save_cache(tmp_path / "cache", host)
    for one, other in (
        (host, cache),
        (host.rows(order), cache.rows(order)),
        (host.repeat(2)[:4], cache.repeat(2)[:4]),
        (load_cache(tmp_path / "cache"), cache),
    ):
        assert all(on_host(v) for v in far(one))
        found = [
            kvjax.generate(tiny.params(), tiny.CONFIG, policy, tiny.QUESTION, cache=which, max_new_tokens=5)[0]
            for which in (one, other)
        ]
        np.testing.assert_array_equal(*found)
        logits, after = kvjax.extend(tiny.params(), tiny.CONFIG, policy, one, tiny.QUESTION)
        want, _ = kvjax.extend(tiny.params(), tiny.CONFIG, policy, other, tiny.QUESTION)
        np.testing.assert_array_equal(logits, want)
        assert all(on_host(v) for v in far(after))
