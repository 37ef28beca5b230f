"""What one call of prefill attention asks for, checked and brought into one form that every implementation reads."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax import Array, lax

from kvjax.kernels.choose import KernelError
from kvjax.kernels.prefill.statistics import Statistics
from kvjax.kernels.vectors import static


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Past:
    """Keys and values that came before a chunk, in any order.

    Attributes:
      k, v: [B, H, P, D].
      pos: Positions [B, 1 or H, P] int32, negative where there is no token; k and v may hold anything there.
    """

    k: Array
    v: Array
    pos: Array


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Attention of a prompt, or of a chunk of one, over itself and what came before.

    Every rule of visibility is one interval: a query sees the keys that stand at `low ... place`, its own place. Places
    are positions; packed prompts follow one another on one axis of places.

    Attributes:
      q: [B, H, G, T, D], already multiplied by the scale, in the keys' type.
      k, v: [B, H, T, D]; values may have another number of channels.
      place: Where each token stands [B, T] int32, -1 for padding, which sees nothing and is not seen.
      low: The first place that each query sees [B, T] int32.
      age: Tokens between a query and the last of its prompt [B, T] int32.
      past: What came before, or None.
      softcap: `cap * tanh(logits / cap)`; 0 for none.
      window: Keys `window` positions and more before a query are out of its sight (`low` says so already); 0: none are.
      statistics: What to say besides the output.
    """

    q: Array
    k: Array
    v: Array
    place: Array
    low: Array
    age: Array
    past: Past | None = None
    softcap: float = static(default=0.0)
    window: int = static(default=0)
    statistics: Statistics = static(default=Statistics())  # noqa: RUF009

    @property
    def past_place(self) -> Array:
        """Places of the past [B, 1 or H, P] int32, which are its positions."""
        assert self.past is not None
        return jnp.maximum(self.past.pos, -1)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
    """The answer; keys are those of the past, then the new ones (S = P + T). Query heads as in q: `h * G + g`.

    Attributes:
      out: [B, H * G, T, D] in the values' type; zero where nothing is visible.
      lse: Log-sum-exp of the logits [B, H * G, T] float32, `parts.NEG` where nothing is visible; or None.
      entropy: Of the attention weights, in nats [B, H * G, T] float32, 0 where nothing is visible; or None.
      column_sums: One for each asked for, [B, H * G, S] float32.
      window: Attention weights of the row's last W queries [B, H * G, W, S] float32, the last one last, zero in front
        where a row is shorter; or None.
    """

    out: Array
    lse: Array | None = None
    entropy: Array | None = None
    column_sums: tuple[Array, ...] = ()
    window: Array | None = None


def make_request(
    q: Array,
    k: Array,
    v: Array,
    pos: Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    segments: Array | None = None,
    past: Past | None = None,
    statistics: Statistics = Statistics(),  # noqa: B008
) -> Request:
    """See `prefill_attention`.

    Raises:
      KernelError: Shapes do not go together, or packed prompts come with a past.
    """
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    if heads % kv_heads or k.shape != (batch, kv_heads, length, dim) or v.shape[:3] != k.shape[:3]:
        raise KernelError(
            "Keys and values are [B, H, T, D] for queries [B, H * G, T, D], values with channels of their own; got "
            f"q {q.shape}, k {k.shape}, v {v.shape}."
        )
    if pos.shape != (batch, length) or (segments is not None and segments.shape != pos.shape):
        raise KernelError(
            f"Positions and segments are [B, T] = [{batch}, {length}], got {pos.shape}"
            + (f" and {segments.shape}." if segments is not None else ".")
        )
    if past is not None:
        if segments is not None:
            raise KernelError("Packed prompts start afresh: give either segments or a past.")
        if (
            past.k.shape[2] != past.pos.shape[2]
            or past.k.shape[:2] != k.shape[:2]
            or past.v.shape[:3] != past.k.shape[:3]
        ):
            raise KernelError(
                "The past has keys and values [B, H, P, D] and positions [B, 1 or H, P]; got "
                f"{past.k.shape}, {past.v.shape}, {past.pos.shape}."
            )
    start, end = _prompts(pos, segments)
    place = jnp.where(pos >= 0, pos + start, -1)
    low = jnp.maximum(start, place - window + 1) if window else start
    return Request(
        q=(q * scale).astype(k.dtype).reshape(batch, kv_heads, heads // kv_heads, length, dim),
        k=k,
        v=v,
        place=place,
        low=low,
        age=end - place,
        past=past if past is not None and past.k.shape[2] else None,
        softcap=softcap,
        window=window,
        statistics=statistics,
    )


def _prompts(pos: Array, segments: Array | None) -> tuple[Array, Array]:
    """Places of the first and of the last token of each token's prompt, [B, T] int32 each."""
    if segments is None:
        return jnp.zeros_like(pos), jnp.broadcast_to(pos.max(1, keepdims=True), pos.shape)
    here = pos >= 0
    ends = jnp.pad((segments[:, 1:] != segments[:, :-1]) | ~here[:, 1:], ((0, 0), (0, 1)), constant_values=True) & here
    room = jnp.where(ends, pos + 1, 0)  # Places that a prompt takes, where it ends.
    start = jnp.cumsum(room, 1) - room
    # A prompt ends where the first end from here on stands; places only grow.
    far = jnp.iinfo(jnp.int32).max
    end = lax.cummin(jnp.where(ends, pos + start, far), axis=1, reverse=True)
    return start, end
