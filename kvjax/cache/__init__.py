"""What a model remembers, as immutable pytrees."""

from kvjax.cache.attend import attend as attend
from kvjax.cache.codec import Packed as Packed, Plain as Plain, Scaled as Scaled
from kvjax.cache.grouped import GroupedSlots as GroupedSlots, make_grouped as make_grouped
from kvjax.cache.slots import Slots as Slots, make_ring as make_ring
from kvjax.cache.types import (
    EMPTY as EMPTY,
    Cache as Cache,
    LayerCache as LayerCache,
    LayerSpec as LayerSpec,
    Tokens as Tokens,
    tree_nbytes as tree_nbytes,
)
