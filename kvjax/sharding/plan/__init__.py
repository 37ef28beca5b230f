"""What a model and its cache would need on machines that nobody has rented yet: `ask`, then `answer`."""

from kvjax.sharding.plan.chips import CHIPS as CHIPS, PlanError as PlanError, parse_topology as parse_topology
from kvjax.sharding.plan.compile import CompileError as CompileError
from kvjax.sharding.plan.planner import Planned as Planned, answer as answer, ask as ask, parse_number as parse_number
from kvjax.sharding.plan.report import as_dict as as_dict, report as report
from kvjax.sharding.plan.suggest import Question as Question
