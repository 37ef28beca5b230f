"""How a written answer is scored."""

from collections.abc import Callable, Mapping
from typing import Any

METRICS: dict[str, Callable[[str, tuple[str, ...], Mapping[str, Any]], float]] = {}
