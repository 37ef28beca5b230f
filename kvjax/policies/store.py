"""How kept tokens are laid out in bytes."""

import dataclasses
from typing import Any

from kvjax.cache import LayerSpec, Plain, Slots, make_grouped
from kvjax.cache.codec import Codec
from kvjax.cache.pages import Pages, Together, make_pages
from kvjax.kernels.packing import codes_per_word
from kvjax.policies.observe import Needs, Observation, Prompt


@dataclasses.dataclass(frozen=True)
class Role:
    """What one layer is to do among all compressed layers: for the last stage, the store and the reader of a policy, as
    their `role` says. Hashable, part of the program; layers of one role share a compilation.

    Attributes:
      whole: The layer stays in full precision, for a transform to lay out.
    """

    stage: Any = None
    store: Any = None
    read: Any = None
    whole: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """What is known of a layer when it is laid out, beside the tokens that stay.

    Attributes:
      obs: What was seen of the layer's queries.
      spec: The layer.
      capacity: Slots per head that are allocated for the tokens that stay; the mean over heads where these differ.
      role: What this layer is to do among the others.
      bound: Slots per head that it may grow to where a stage goes on evicting; 0: not known.
      rest: Tokens that a stage has not kept, for stores that hold them too; None if there are none.
    """

    obs: Observation
    spec: LayerSpec
    capacity: int
    role: Role = Role()
    bound: int = 0
    rest: Prompt | None = None


class Store:
    """Base of every store: a frozen, hashable value that lays out a layer's tokens.

    Attributes:
      needs: What it asks to see of a prompt.
      slotwise: Whether single tokens can be overwritten, as rings and policies that evict while decoding do.
      holds_rest: Whether tokens that a stage does not keep are laid out too, in another way (`Built.rest`).
    """

    needs = Needs()
    slotwise = False
    holds_rest = False

    def build(self, prompt: Prompt, about: Built) -> Any:
        """The cache of one layer that holds these tokens and grows with new ones."""
        raise NotImplementedError

    def ragged(self) -> "Store":
        """The same layout for heads that keep different numbers of tokens.

        Raises:
          ValueError: There is none.
        """
        raise ValueError(f"{type(self).__name__} holds as many tokens in every head")

    def role(self, layer: int, layers: int) -> Any:
        """What the layer-th of all compressed layers is to do: a hashable value; None where all do the same."""
        del layer, layers

    def check(self, config: Any) -> None:
        """Raises ValueError where a model's shapes do not fit."""
        del config


@dataclasses.dataclass(frozen=True)
class Slotwise(Store):
    """Every token by itself, as `codec` writes it."""

    codec: Codec = Plain()
    slotwise = True

    def ragged(self) -> "Paged":
        return Paged(k_codec=self.codec, v_codec=self.codec)

    def build(self, prompt: Prompt, about: Built) -> Slots:
        latent = about.spec.latent
        v = None if latent else self.codec.encode(prompt.v)
        return Slots(k=self.codec.encode(prompt.k), v=v, pos=prompt.pos, codec=self.codec, latent=latent)

    def check(self, config: Any) -> None:
        self.codec.check(config.key_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paged(Store):
    """Pages of a head's tokens in a pool for all heads, which may keep different numbers; less than a page per head
    stays as it is.

    Attributes:
      page: Tokens of a page.
      k_codec, v_codec: How full pages are written; they may pack a page's tokens together.
    """

    page: int = 16
    k_codec: Codec = Plain()
    v_codec: Codec = Plain()

    def ragged(self) -> "Paged":
        return self

    def build(self, prompt: Prompt, about: Built) -> Pages:
        return make_pages(
            prompt.k,
            prompt.v,
            prompt.pos,
            page=self.page,
            tokens=prompt.k.shape[1] * about.capacity,
            k_codec=self.k_codec,
            v_codec=self.v_codec,
        )

    def check(self, config: Any) -> None:
        self.k_codec.check(config.key_dim)
        self.v_codec.check(config.value_dim)
        if config.mla is not None:
            raise ValueError("pages hold keys and values apart, and latent attention has them in one. Use full.")


@dataclasses.dataclass(frozen=True)
class Grouped(Store):
    """KIVI's groups: keys per channel over tokens, values per token over channels, the newest in full precision.

    Attributes:
      bits: 2, 4 or 8.
      group: Tokens (keys) or channels (values) that share scale and zero.
      residual: Newest tokens in full precision.
      scale_dtype: Of scales and zeros.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128
    scale_dtype: str = "float16"

    def __post_init__(self):
        per = codes_per_word(self.bits)
        if self.residual % self.group or self.residual % per:
            raise ValueError(
                f"residual={self.residual} must be a multiple of group={self.group} and of the {per} codes in a word: "
                "a full residual is packed at once."
            )

    def ragged(self) -> Paged:
        """A full residual becomes a page: keys and values of its tokens are packed at once."""
        codec = Together(self.bits, self.group, -2, self.scale_dtype)
        return Paged(page=self.residual, k_codec=codec, v_codec=dataclasses.replace(codec, axis=-1))

    def build(self, prompt: Prompt, about: Built) -> Any:
        del about
        return make_grouped(
            prompt.k,
            prompt.v,
            prompt.pos,
            bits=self.bits,
            group=self.group,
            residual=self.residual,
            scale_dtype=self.scale_dtype,
        )

    def check(self, config: Any) -> None:
        if config.value_dim % self.group or config.value_dim % codes_per_word(self.bits):
            raise ValueError(
                f"Values are packed in groups of {self.group} channels, {codes_per_word(self.bits)} codes a word; this "
                f"model's values have {config.value_dim} channels. Choose a group that divides it."
            )
