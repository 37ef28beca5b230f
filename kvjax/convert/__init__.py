"""Models into models: functions from parameters and a config to others, whose cache is smaller by construction."""

from kvjax.convert.transmla import transmla as transmla

__all__ = ["transmla"]
