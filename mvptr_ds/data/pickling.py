"""Pickling without caches: what a process can make again does not travel to another."""

from __future__ import annotations

from typing import Any, ClassVar


class PicklesWithoutCaches:
    """Mixin that pickles an object without the attributes named in `_CACHES`; unpickling makes them anew.

    A subclass sets all of them in `_init_caches`, which its `__init__` calls, too.
    """

    _CACHES: ClassVar[tuple[str, ...]]

    def _init_caches(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._CACHES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_caches()
