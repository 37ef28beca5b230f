"""Prefill, extension and decoding: pure functions of (params, config, policy, cache, tokens)."""

from kvjax.generation.decode import decode as decode
from kvjax.generation.extend import extend as extend, extend_hidden as extend_hidden, with_room as with_room
from kvjax.generation.generate import generate as generate, stream as stream, stream_on as stream_on
from kvjax.generation.prefill import observe as observe, prefill as prefill, prefill_logits as prefill_logits
from kvjax.generation.sample import Sampler as Sampler, sample as sample
