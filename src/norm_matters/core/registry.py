"""Named things (models, norms, datasets, regimes), found by name or refused with the nearest one."""

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from norm_matters.core.errors import UserError, nearest

T = TypeVar("T")


PLUGINS = "norm_matters"
"""The group of entry points by which installed packages add things of their own."""


@cache
def load_plugins() -> None:
    """Import the modules that installed packages name in their entry points; they register what they bring.

    Raises:
        UserError: one of them fails.
    """
    for plugin in entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"the plugin '{plugin.name}' ({plugin.value}) cannot be loaded: {problem}") from error


class Registry(Generic[T]):
    """A table from name to thing. Names are known without importing what they stand for.

    A name that is not known may be a plugin's (`load_plugins`).

    Args:
        kind: what the things are, for messages ("model").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._targets: dict[str, T | str] = {}
        self._summaries: dict[str, str] = {}

    def register(self, name: str, target: T | str, *, summary: str = "") -> None:
        """Add a thing.

        Args:
            name: unique; a second registration raises ValueError.
            target: the thing, or `"package.module:attribute"`, imported at the first `get`.
            summary: one line for `norm-matters list`.
        """
        if name in self._targets:
            raise ValueError(f"{self.kind} '{name}' is registered already")
        self._targets[name] = target
        self._summaries[name] = summary

    def get(self, name: str) -> T:
        """Return the thing of that name; UserError with the nearest name otherwise."""
        self.check(name)
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = cast(T, getattr(importlib.import_module(module), attribute))
            self._targets[name] = target
        return target

    def check(self, name: str) -> None:
        """Raise UserError unless `name` is registered; imports nothing of ours."""
        if name not in self._targets:
            load_plugins()
        if name not in self._targets:
            hint = nearest(name, self._targets) or f"; there are: {', '.join(self._targets)}"
            raise UserError(f"unknown {self.kind} '{name}'{hint}")

    def names(self) -> list[str]:
        """All names, in the order of registration; plugins' last."""
        load_plugins()
        return list(self._targets)

    def summary(self, name: str) -> str:
        """The one-line description given at registration."""
        return self._summaries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._targets
