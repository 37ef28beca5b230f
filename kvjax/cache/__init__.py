"""What a model remembers, as immutable pytrees."""

from kvjax.cache.attend import attend as attend
from kvjax.cache.codec import Packed as Packed
from kvjax.cache.codec import Plain as Plain
from kvjax.cache.codec import Scaled as Scaled
from kvjax.cache.grouped import GroupedSlots as GroupedSlots
from kvjax.cache.grouped import make_grouped as make_grouped
from kvjax.cache.slots import Slots as Slots
from kvjax.cache.slots import make_ring as make_ring
from kvjax.cache.types import EMPTY as EMPTY
from kvjax.cache.types import Cache as Cache
from kvjax.cache.types import LayerCache as LayerCache
from kvjax.cache.types import LayerSpec as LayerSpec
from kvjax.cache.types import Tokens as Tokens
from kvjax.cache.types import tree_nbytes as tree_nbytes
