"""What was used last, kept in memory within a bound."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Cache(Generic[Key, Value]):
    """Values by key; the least recently used ones are forgotten first.

    Args:
        limit: what all values may come to; 0 keeps nothing.
        size: what a value comes to, such as its bytes."""

    def __init__(self, limit: int, size: Callable[[Value], int]):
        self.limit, self.used = limit, 0
        self.size = size
        self._kept: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value of a key that is remembered."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Remembers a value, in place of the one that the key had."""
        if key in self._kept:
            self.used -= self.size(self._kept.pop(key))
        self._kept[key] = value
        self.used += self.size(value)
        while self.used > self.limit:
            self.used -= self.size(self._kept.popitem(last=False)[1])
