"""KV-cache compression in JAX: a cache is data, a policy is a value, everything between them is a pure function."""

# The folder of methods first: imported later, it would take the place of the function `methods` below.
from kvjax import convert as convert, methods as _folder, sharding as sharding  # noqa: F401
from kvjax.cache import Cache as Cache
from kvjax.checkpoints import CheckpointError as CheckpointError
from kvjax.generation import (
    Sampler as Sampler,
    decode as decode,
    extend as extend,
    generate as generate,
    observe as observe,
    prefill as prefill,
    prefill_logits as prefill_logits,
)
from kvjax.model import Model as Model, load as load
from kvjax.models import Config as Config, forward as forward, init_params as init_params
from kvjax.policies import (
    Budget as Budget,
    Policy as Policy,
    PolicyError as PolicyError,
    compress as compress,
    methods as methods,
    parse_policy as parse_policy,
    plan as plan,
    policy as policy,
)
