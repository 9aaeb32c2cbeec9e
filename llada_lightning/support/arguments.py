"""The arguments that an object was made with."""

from __future__ import annotations

import inspect
from typing import Any


class KeepsArguments:
    """A base class whose objects know the arguments of their constructor, defaults included.

    Where a subclass passes its arguments on (``*args``, ``**kwargs``), those of the base class are known, too.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        object.__setattr__(made, "_arguments", _bound(cls, args, kwargs))
        return made

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by their names."""
        found: dict[str, Any] = object.__getattribute__(self, "_arguments")
        return found


def _bound(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor by name. Those that it lacks, or that a subclass sets itself, are left out."""
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    try:
        bound = signature.bind_partial(None, *args, **kwargs)
    except TypeError:  # the constructor is about to report it
        return {}
    bound.apply_defaults()
    found: dict[str, Any] = {}
    passed_on: tuple[Any, ...] = ()
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            base = next(base for base in cls.__mro__[1:] if "__init__" in vars(base))
            found = {**_bound(base, passed_on, value), **found}
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            passed_on = value
        else:
            found[name] = value
    return found
