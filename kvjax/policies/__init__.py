"""The parts of a policy and their composition."""

from kvjax.policies.budget import Budget as Budget, Divide as Divide, Pyramid as Pyramid, Uniform as Uniform
from kvjax.policies.describe import parts as parts, phase as phase
from kvjax.policies.observe import Needs as Needs, Observation as Observation, Prompt as Prompt
from kvjax.policies.plan import (
    Observed as Observed,
    Plan as Plan,
    abstract_cache as abstract_cache,
    compress as compress,
    compress_decided as compress_decided,
    decide as decide,
    plan as plan,
    with_budget as with_budget,
)
from kvjax.policies.policy import Policy as Policy, PolicyError as PolicyError, attend_with as attend_with
from kvjax.policies.read import Read as Read, ReadAll as ReadAll
from kvjax.policies.registry import (
    Method as Method,
    as_policy as as_policy,
    methods as methods,
    parse_policy as parse_policy,
    policy as policy,
    register as register,
    without_budget as without_budget,
)
from kvjax.policies.select import AcrossHeads as AcrossHeads, TopChunks as TopChunks, TopTokens as TopTokens
from kvjax.policies.stage import (
    Evict as Evict,
    Forget as Forget,
    Phase as Phase,
    Rest as Rest,
    Ring as Ring,
    SplitHeads as SplitHeads,
    Stage as Stage,
)
from kvjax.policies.store import Built as Built, Grouped as Grouped, Role as Role, Slotwise as Slotwise, Store as Store
from kvjax.policies.transform import Transform as Transform
