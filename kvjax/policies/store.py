"""How kept tokens are laid out in bytes."""

import dataclasses
from typing import Any, Protocol

from kvjax.cache import Plain, Slots, make_grouped
from kvjax.cache.codec import Codec
from kvjax.cache.packing import codes_per_word
from kvjax.policies.observe import Prompt


class Store(Protocol):
    @property
    def slotwise(self) -> bool:
        """Whether single tokens can be overwritten, as rings and policies that evict while decoding do."""
        ...

    def build(self, prompt: Prompt) -> Any:
        """The cache of one layer that holds these tokens and grows with new ones."""
        ...

    def check(self, config: Any) -> None:
        """Raises ValueError where a model's shapes do not fit."""
        ...


@dataclasses.dataclass(frozen=True)
class Slotwise:
    """Every token by itself, as `codec` writes it."""

    codec: Codec = Plain()
    slotwise = True

    def build(self, prompt: Prompt) -> Slots:
        return Slots(k=self.codec.encode(prompt.k), v=self.codec.encode(prompt.v), pos=prompt.pos, codec=self.codec)

    def check(self, config: Any) -> None:
        self.codec.check(config.head_dim)


@dataclasses.dataclass(frozen=True)
class Grouped:
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
    slotwise = False

    def __post_init__(self):
        per = codes_per_word(self.bits)
        if self.residual % self.group or self.residual % per:
            raise ValueError(
                f"residual={self.residual} must be a multiple of group={self.group} and of the {per} codes in a word: "
                "a full residual is packed at once."
            )

    def build(self, prompt: Prompt) -> Any:
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
        if config.head_dim % self.group or config.head_dim % codes_per_word(self.bits):
            raise ValueError(
                f"Values are packed in groups of {self.group} channels, {codes_per_word(self.bits)} codes a word; this "
                f"model's head_dim is {config.head_dim}. Choose a group that divides it."
            )
