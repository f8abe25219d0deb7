"""Packages whose names are imported with their first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562), so that importing it imports none of its modules.

    The package names the same once more under ``if TYPE_CHECKING``, for type checkers and editors.

    Args:
        package: its ``__name__``.
        homes: name of a module in it -> what the package offers of that module. The module is offered too.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in home:
            value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        elif name in homes:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # so that it is asked for once
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home, *homes})

    return get, listed
