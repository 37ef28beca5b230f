"""What can be seen of a prompt's attention while it is computed, without the attention matrix ever being whole."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

KEYS = 512  # Whose visibility is counted at once.


@dataclasses.dataclass(frozen=True)
class ColumnSums:
    """Attention that each key receives, summed over queries: the columns of the attention matrix.

    As it stands, H2O's accumulated attention (arXiv 2306.14048).

    Attributes:
      forgetting: A query that is `age` tokens before the row's last one counts `forgetting ** age` (A2SF's forgetting
        factor, arXiv 2407.20485); 1 for all alike.
      window: Only the last so many queries count (SnapKV's observation window, arXiv 2404.14469); 0 for all.
      normalized: Divided by the weight of the queries that could see the key: by their number where all count alike.
        Early keys are seen by more queries; this takes the advantage from them.
    """

    forgetting: float = 1.0
    window: int = 0
    normalized: bool = False

    def __post_init__(self):
        if not 0 < self.forgetting <= 1:
            raise ValueError(f"The forgetting factor is above 0 and at most 1, got {self.forgetting}.")
        if self.window < 0:
            raise ValueError(f"The window is a number of queries, or 0 for all; got {self.window}.")

    @property
    def plain(self) -> bool:
        """Whether all queries count alike."""
        return self.forgetting == 1 and not self.window

    def weights(self, age: Array, present: Array) -> Array:
        """How much each query counts [B, T] float32; nothing where it is not present."""
        weight = jnp.float32(self.forgetting) ** age.astype(jnp.float32)
        return jnp.where(present & (age < self.window) if self.window else present, weight, 0.0)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What `prefill_attention` is to say besides its output; nothing is computed that is not asked for.

    Attributes:
      lse: Log-sum-exp of each query's logits, which joins this attention with another part.
      entropy: Of each query's attention weights, in nats.
      column_sums: Any number of them, taken in one pass.
      window: Attention weights of the row's last so many queries, whole: the only statistic that takes memory times
        its window.
    """

    lse: bool = False
    entropy: bool = False
    column_sums: tuple[ColumnSums, ...] = ()
    window: int = 0


def query_weights(column_sums: tuple[ColumnSums, ...], age: Array, present: Array) -> Array:
    """How much each query counts in each sum: [C, B, T] float32."""
    weights = [sums.weights(age, present) for sums in column_sums]
    return jnp.stack(weights) if weights else jnp.zeros((0, *age.shape), jnp.float32)


def normalize(
    column_sums: tuple[ColumnSums, ...], sums: Array, weights: Array, low: Array, high: Array, place: Array
) -> Array:
    """Divides those sums that ask for it by the weight of the queries that could see each key.

    Args:
      sums: [C, B, H, G, S] float32. weights: Of the queries [C, B, T]. low, high: Places that each sees [B, T].
      place: Of the keys [B, 1 or H, S].
    """
    chosen = [i for i, asked in enumerate(column_sums) if asked.normalized]
    if not chosen:
        return sums
    slots = place.shape[-1]
    width = min(KEYS, slots)
    keys = jnp.pad(place, ((0, 0), (0, 0), (0, -slots % width)), constant_values=-1)
    keys = jnp.moveaxis(keys.reshape(*place.shape[:2], -1, width), 2, 0)

    def count(keys: Array) -> Array:
        seen = sees(low, high, keys)  # [B, 1 or H, T, width]
        return jnp.stack([jnp.where(seen, weights[i][:, None, :, None], 0.0).sum(2) for i in chosen])

    seen = jnp.moveaxis(lax.map(count, keys), 0, 3).reshape(len(chosen), *place.shape[:2], -1)[..., None, :slots]
    number = jnp.ones((len(column_sums), *seen.shape[1:]), jnp.float32).at[jnp.array(chosen)].set(seen)
    return jnp.where(number > 0, sums / jnp.where(number > 0, number, 1.0), 0.0)


def sees(low: Array, high: Array, place: Array) -> Array:
    """Which keys stand where a query sees: low, high [B, T] and place [B, 1 or H, S] -> [B, 1 or H, T, S] bool."""
    place = place[:, :, None]
    return (place >= low[:, None, :, None]) & (place <= high[:, None, :, None])
