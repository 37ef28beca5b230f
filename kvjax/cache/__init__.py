"""What a model remembers, as immutable pytrees."""

from kvjax.cache.by_head import ByHead as ByHead
from kvjax.cache.codec import Packed as Packed, Plain as Plain, Scaled as Scaled
from kvjax.cache.demoting import Demoting as Demoting
from kvjax.cache.gear import GearRecipe as GearRecipe, GearSlots as GearSlots, make_gear as make_gear
from kvjax.cache.grouped import GroupedSlots as GroupedSlots, make_grouped as make_grouped
from kvjax.cache.host import memory_nbytes as memory_nbytes
from kvjax.cache.layer import Layer as Layer, Mark as Mark
from kvjax.cache.low_rank import FarChunks as FarChunks, far_and_near as far_and_near
from kvjax.cache.pages import Pages as Pages, Together as Together, make_pages as make_pages
from kvjax.cache.slots import Slots as Slots, make_ring as make_ring
from kvjax.cache.tiers import Balance as Balance, Channels as Channels, Through as Through, Tiers as Tiers
from kvjax.cache.types import (
    EMPTY as EMPTY,
    Cache as Cache,
    LayerSpec as LayerSpec,
    Tokens as Tokens,
    tree_nbytes as tree_nbytes,
)
