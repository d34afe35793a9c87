"""Packages whose names are there without being imported: `--help` must not wait for torch."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_attributes(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """A `__getattr__` for a package (PEP 562) that imports a submodule at the first use of one of its names.

    Args:
        package: the package's `__name__`.
        homes: submodule -> the names it provides.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)

    return get
