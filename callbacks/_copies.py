"""Pickles and deep copies of callbacks: trainers copy them, and send them to other processes."""

from __future__ import annotations

from typing import Any, Self


class Copyable:
    """An object that is copied as what it was made of: threads and locks are each copy's own.

    A copy has no part in a training that is under way: it is as good as new.
    """

    _made_of: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Remembers what `__init__` is called with."""
        made = super().__new__(cls)
        made._made_of = (arguments, options)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how a copy is made."""
        return _make, (type(self), *self._made_of)


def _make(kind: type[Copyable], arguments: tuple[Any, ...], options: dict[str, Any]) -> Copyable:
    return kind(*arguments, **options)
