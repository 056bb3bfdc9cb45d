"""A property that is found out once, by the first of several threads that asks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar, overload

Owner = TypeVar("Owner")
Value = TypeVar("Value")

_MAKING = threading.Lock()


class once(Generic[Owner, Value]):
    """As functools.cached_property, whose function several threads may run at once; this one's only one does.

    What it raises is not kept: the next one that asks tries again.
    """

    def __init__(self, function: Callable[[Owner], Value]) -> None:
        self._function = function
        self._name = function.__name__
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, owner: None, kind: type[Owner]) -> once[Owner, Value]: ...

    @overload
    def __get__(self, owner: Owner, kind: type[Owner]) -> Value: ...

    def __get__(self, owner: Owner | None, kind: type[Owner]) -> once[Owner, Value] | Value:
        if owner is None:
            return self
        values = owner.__dict__
        with _MAKING:
            lock: threading.Lock = values.setdefault(f"{self._name} lock", threading.Lock())
        with lock:
            if self._name not in values:
                values[self._name] = self._function(owner)
            value: Value = values[self._name]
            return value
