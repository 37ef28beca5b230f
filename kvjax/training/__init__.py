"""Trainers for the methods that learn something, and the loop they share."""

from kvjax.training.loop import (
    TrainingError as TrainingError,
    load_state as load_state,
    read_log as read_log,
    train as train,
)
