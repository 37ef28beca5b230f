"""Prefill, extension and decoding: pure functions of (params, config, policy, cache, tokens)."""

from kvjax.generation.decode import decode as decode
from kvjax.generation.extend import extend as extend
from kvjax.generation.extend import extend_hidden as extend_hidden
from kvjax.generation.extend import with_room as with_room
from kvjax.generation.generate import generate as generate
from kvjax.generation.generate import stream as stream
from kvjax.generation.generate import stream_on as stream_on
from kvjax.generation.prefill import observe as observe
from kvjax.generation.prefill import prefill as prefill
from kvjax.generation.prefill import prefill_logits as prefill_logits
from kvjax.generation.sample import Sampler as Sampler
from kvjax.generation.sample import sample as sample
