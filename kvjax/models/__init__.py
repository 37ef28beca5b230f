"""Decoder-only transformers: one configurable model, families as data."""

from kvjax.models.config import Config as Config, Mla as Mla, Rope as Rope
from kvjax.models.params import (
    abstract_params as abstract_params,
    init_params as init_params,
    layer_params as layer_params,
    stack_layers as stack_layers,
)
from kvjax.models.transformer import forward as forward
