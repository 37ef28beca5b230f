"""The parts of a policy and their composition."""

from kvjax.policies.budget import Budget as Budget, Pyramid as Pyramid, Uniform as Uniform
from kvjax.policies.describe import parts as parts, phase as phase
from kvjax.policies.observe import Needs as Needs, Observation as Observation, Prompt as Prompt
from kvjax.policies.plan import (
    Observed as Observed,
    Plan as Plan,
    abstract_cache as abstract_cache,
    compress as compress,
    plan as plan,
)
from kvjax.policies.policy import Policy as Policy, PolicyError as PolicyError, attend_with as attend_with
from kvjax.policies.registry import (
    Method as Method,
    as_policy as as_policy,
    methods as methods,
    parse_policy as parse_policy,
    policy as policy,
    register as register,
)
from kvjax.policies.select import TopChunks as TopChunks, TopTokens as TopTokens
from kvjax.policies.stage import Evict as Evict, Phase as Phase, Ring as Ring
from kvjax.policies.store import Grouped as Grouped, Slotwise as Slotwise
