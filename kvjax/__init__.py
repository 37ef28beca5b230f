"""kvjax: KV-cache compression in JAX. A cache is data, a policy is a value, everything between them is a pure function.
"""

# The folder of methods first: imported later, it would take the place of the function `methods` below.
from kvjax import methods as _folder  # noqa: F401
from kvjax.cache import Cache as Cache
from kvjax.checkpoints import CheckpointError as CheckpointError
from kvjax.generation import Sampler as Sampler
from kvjax.generation import decode as decode
from kvjax.generation import extend as extend
from kvjax.generation import generate as generate
from kvjax.generation import observe as observe
from kvjax.generation import prefill as prefill
from kvjax.generation import prefill_logits as prefill_logits
from kvjax.model import Model as Model
from kvjax.model import load as load
from kvjax.models import Config as Config
from kvjax.models import forward as forward
from kvjax.models import init_params as init_params
from kvjax.policies import Budget as Budget
from kvjax.policies import Policy as Policy
from kvjax.policies import PolicyError as PolicyError
from kvjax.policies import compress as compress
from kvjax.policies import methods as methods
from kvjax.policies import parse_policy as parse_policy
from kvjax.policies import plan as plan
from kvjax.policies import policy as policy
