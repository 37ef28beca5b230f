"""The parts of a policy and their composition."""

from kvjax.policies.budget import Budget as Budget
from kvjax.policies.budget import Pyramid as Pyramid
from kvjax.policies.budget import Uniform as Uniform
from kvjax.policies.observe import Needs as Needs
from kvjax.policies.observe import Observation as Observation
from kvjax.policies.observe import Prompt as Prompt
from kvjax.policies.plan import Observed as Observed
from kvjax.policies.plan import Plan as Plan
from kvjax.policies.plan import compress as compress
from kvjax.policies.plan import plan as plan
from kvjax.policies.policy import Policy as Policy
from kvjax.policies.policy import PolicyError as PolicyError
from kvjax.policies.policy import attend_with as attend_with
from kvjax.policies.registry import Method as Method
from kvjax.policies.registry import as_policy as as_policy
from kvjax.policies.registry import methods as methods
from kvjax.policies.registry import parse_policy as parse_policy
from kvjax.policies.registry import policy as policy
from kvjax.policies.registry import register as register
from kvjax.policies.select import TopChunks as TopChunks
from kvjax.policies.select import TopTokens as TopTokens
from kvjax.policies.stage import Evict as Evict
from kvjax.policies.stage import Phase as Phase
from kvjax.policies.stage import Ring as Ring
from kvjax.policies.store import Grouped as Grouped
from kvjax.policies.store import Slotwise as Slotwise
