"""Registries: the implementations of one kind by name, each kind in a folder where one more file adds one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .errors import UserError

T = TypeVar("T")
S = TypeVar("S")


class Registry(Generic[T]):
    """The implementations of one kind by name, in alphabetical order.

    A module of `package` adds what it defines; no other file needs to know it:

        @SOLVERS.add("heun")
        class Heun(Solver): ...

    The modules of the package are imported at the first lookup. A user's own script may add more before it calls the library.

    Args:
        setting: the setting that chooses one, e.g. "network.family"; starts the error message of an unknown name.
        package: dotted name of the package whose modules add them.
    """

    def __init__(self, setting: str, package: str) -> None:
        self.setting, self.package = setting, package
        self._known: dict[str, T] = {}
        self._complete = False

    def add(self, name: str) -> Callable[[S], S]:
        """Return a decorator that adds a class, function or instance under a name.

        Raises:
            ValueError: if the name is taken.
        """

        def added(value: S) -> S:
            if name in self._known:
                raise ValueError(f"{self.setting}: {name!r} is registered twice")
            self._known[name] = value  # type: ignore[assignment]
            return value

        return added

    def names(self) -> tuple[str, ...]:
        """Return all names, in alphabetical order: it does not depend on what has been imported before."""
        self._import()
        return tuple(sorted(self._known))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> T:
        """Return what is registered under a name.

        Raises:
            UserError: if there is none; the message lists the names.
        """
        self._import()
        if name not in self._known:
            raise UserError(f"{self.setting}={name!r} must be one of {', '.join(self.names())}")
        return self._known[name]

    def _import(self) -> None:
        """Import the modules of the package, in alphabetical order; a name that starts with _ is skipped."""
        if self._complete:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")
        self._complete = True
