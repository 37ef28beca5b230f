"""Decoder-only transformers: one configurable model, families as data."""

from kvjax.models.config import Config as Config
from kvjax.models.config import Rope as Rope
from kvjax.models.params import abstract_params as abstract_params
from kvjax.models.params import init_params as init_params
from kvjax.models.params import layer_params as layer_params
from kvjax.models.params import stack_layers as stack_layers
from kvjax.models.transformer import forward as forward
