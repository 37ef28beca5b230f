"""Names for policies: `policy("snapkv", budget=0.25)` and `parse_policy("snapkv(0.25) | kivi(bits=2)")`.

A method is a function from parameters to a `Policy`, in a file of its own under `kvjax/methods/`; its signature is its
documentation. Files there are found by themselves.
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from kvjax.policies.policy import Policy, PolicyError

_METHODS: dict[str, "Method"] = {}


@dataclasses.dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
      name: As it is written in a policy.
      build: Parameters -> Policy.
      paper: Title or short citation.
      url: Of the paper or the original code.
      summary: First sentence of the docstring.
      example: Parameters that make a typical policy, for tests and listings.
      small: Further ones that make it fit prompts of twenty tokens and heads of sixteen channels, for tests.
    """

    name: str
    build: Callable[..., Policy]
    paper: str
    url: str
    summary: str
    example: Mapping[str, Any]
    small: Mapping[str, Any]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.build).parameters)

    @property
    def signature(self) -> str:
        """Such as `snapkv(budget, window=32, pool=5)`."""
        shown = [name if p.default is p.empty else f"{name}={p.default!r}" for name, p in self.parameters.items()]
        return f"{self.name}({', '.join(shown)})"

    def typical(self) -> Policy:
        return policy(self.name, **self.example)


def register(
    paper: str, url: str, *, small: Mapping[str, Any] | None = None, **example: Any
) -> Callable[[Callable[..., Policy]], Callable[..., Policy]]:
    """Decorator of a method's builder; the function's name is the method's. A later one of the same name replaces it.

    Args:
      paper, url: Where it comes from.
      small: Parameters that make it fit prompts of twenty tokens and heads of sixteen channels, for tests; the budget
        is a half by itself.
      example: Parameters of a typical policy.
    """

    def add(build: Callable[..., Policy]) -> Callable[..., Policy]:
        summary = (inspect.getdoc(build) or "").split("\n\n")[0].replace("\n", " ")
        typical, fit = MappingProxyType(dict(example)), MappingProxyType(dict(small or {}))
        _METHODS[build.__name__] = Method(build.__name__, build, paper, url, summary, typical, fit)
        return build

    return add


def methods() -> Mapping[str, Method]:
    """Every registered method by name: those in `kvjax/methods`, and what a notebook has registered."""
    _discover()
    return MappingProxyType(dict(sorted(_METHODS.items())))


@functools.cache
def _discover() -> None:
    package = importlib.import_module("kvjax.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"kvjax.methods.{module.name}")


def nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    return f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(sorted(known))}."


def policy(name: str, *args: Any, **params: Any) -> Policy:
    """A policy by its method's name and parameters.

    Args:
      name: See `kvjax methods`.
      *args: Positional parameters; the first is usually the budget: an int (tokens), a float (ratio kept), "64KiB"
      (bytes).
      **params: The method's parameters.

    Raises:
      PolicyError: Unknown method or parameter (near names are offered), or parameters that make no sense.
    """
    known = methods()
    if name not in known:
        raise PolicyError(f"Unknown method {name!r}. {nearest(name, known)}")
    method = known[name]
    for key in params:
        if key not in method.parameters:
            raise PolicyError(
                f"{name} has no parameter {key!r}. {nearest(key, method.parameters)} It is {method.signature}."
            )
    try:
        inspect.signature(method.build).bind(*args, **params)
    except TypeError as error:
        raise PolicyError(f"{name}: {error}. It is {method.signature}.") from None
    try:
        built = method.build(*args, **params)
    except ValueError as error:
        raise PolicyError(f"{name}: {error}") from None
    shown = [_show(value) for value in args] + [f"{key}={_show(value)}" for key, value in params.items()]
    label = f"{name}({', '.join(shown)})" if shown else name
    return dataclasses.replace(built, label=label)


def _show(value: Any) -> str:
    return str(value) if dataclasses.is_dataclass(value) or isinstance(value, Policy) else repr(value)


def parse_policy(text: str, budget: Any = None) -> Policy:
    """A policy as it is written in tables and on the command line, such as `snapkv(0.25, window=16) | kivi(bits=2)`.

    Values are numbers, quoted strings, bare names (`chunkkv(0.25, score=knorm)`) or a method with its parameters
    (`score=snapkv(window=16)`), passed on as text.

    Args:
      text: The policy.
      budget: For methods in it that need one and give none.

    Raises:
      PolicyError: It cannot be read, or a part of it makes no sense.
    """
    return _build(_tree(text), text, budget)


def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise PolicyError(
            f"Cannot read the policy {text!r}: {error.msg}. Write it like snapkv(0.25) | kivi(bits=2)."
        ) from None


def _build(node: ast.expr, text: str, budget: Any) -> Policy:
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _build(left, text, budget) | _build(right, text, budget)
        case ast.Name(id=name):
            return policy(name, *_missing_budget(name, (), {}, budget))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            params = {keyword.arg: _value(keyword.value, text) for keyword in keywords if keyword.arg}
            given = tuple(_value(arg, text) for arg in args)
            return policy(name, *_missing_budget(name, given, params, budget), **params)
        case _:
            raise PolicyError(
                f"Cannot read {ast.unparse(node)!r} in the policy {text!r}. Write it like snapkv(0.25) | kivi(bits=2)."
            )


def _missing_budget(name: str, args: tuple[Any, ...], params: Mapping[str, Any], budget: Any) -> tuple[Any, ...]:
    """The positional parameters, with the default budget where the method wants one and none is given."""
    wants = name in methods() and "budget" in methods()[name].parameters
    return (budget,) if wants and budget is not None and not args and "budget" not in params else args


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name | ast.Call):
        return ast.unparse(node)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise PolicyError(f"Cannot read the value {ast.unparse(node)!r} in the policy {text!r}.") from None


def without_budget(text: str) -> tuple[str, str | None]:
    """What a policy is called whatever its size, and its first budget as it was written: "snapkv(0.25) | kivi" is
    ("snapkv | kivi", "0.25"); of a policy without a budget ("kivi", None).

    Raises:
      PolicyError: It cannot be read.
    """
    tree, found = _tree(text), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in methods():
            first = next(iter(methods()[node.func.id].parameters), None)
            if first == "budget" and node.args:
                found.append(node.args.pop(0))
            for keyword in [keyword for keyword in node.keywords if keyword.arg == "budget"]:
                node.keywords.remove(keyword)
                found.append(keyword.value)
    written = [
        str(ast.literal_eval(value)) if isinstance(value, ast.Constant) else ast.unparse(value) for value in found
    ]
    return ast.unparse(tree).replace("()", ""), written[0] if written else None


def as_policy(value: "Policy | str | None") -> Policy:
    """A policy, its text, or None for the full cache."""
    if value is None:
        return Policy()
    return value if isinstance(value, Policy) else parse_policy(value)
