"""What a checkpoint needs of a place that keeps objects: the interface that session rules build on.

An object is bytes under a key with slashes, below the store's root. There are no directories and no
locks, nothing is renamed or appended to. `put_new` is the only thing that two callers can decide a
race with.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

PIECE_BYTES = 16 << 20
MOST_REQUESTS = 32  # in flight, in this process


class Entry(NamedTuple):
    """An object in a listing.

    Attributes:
      key: Its whole key, below the store's root.
      size: Its size, in bytes.
    """

    key: str
    size: int


class Store(Protocol):
    """Objects below one root. Every write is atomic, and durable when it returns.

    All methods may be called from any thread, and repeat requests that failed in passing.

    Raises:
      StoreError: A request failed for good; it names the object. What was to be written may be
        there all the same, now or a moment later.
      StoreAccessError: It was refused for lack of permission, or of credentials.
      ForkedProcessError: This is a forked child of the process that opened it.
    """

    @property
    def url(self) -> str:
        """Where the root is, for messages; without a slash at its end."""
        ...

    def below(self, prefix: str) -> "Store":
        """Returns the store whose root is `prefix`, a key without a slash at its end."""
        ...

    def get(self, key: str) -> bytes | None:
        """Returns an object; None where there is none."""
        ...

    def get_into(self, key: str, offset: int, into: memoryview) -> None:
        """Reads as many bytes of an object from an offset as `into` is long.

        Raises:
          FileNotFoundError: There is no such object.
          ValueError: It ends before.
        """
        ...

    def put(
        self,
        key: str,
        pieces: Iterable[bytes | memoryview],
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes an object, made of pieces one after the other, in place of what is there.

        Args:
          key: Its key.
          pieces: Its content. Large ones are sent from where they are, and must not change.
          check: Called between requests; what it raises ends the writing, and nothing is written.
        """
        ...

    def put_new(self, key: str, data: bytes) -> bool:
        """Writes an object if there is none; returns whether `data` is what is there now.

        Of several that call it one gets True, if `data` is unlike that of all others. It gets it,
        too, if the answer was lost, and another request found what the first one had put.
        """
        ...

    def require_conditions(self, key: str) -> None:
        """Makes sure that `put_new` keeps what is there, by an object that may be deleted if not.

        Raises:
          StoreError: The server ignores conditions.
        """
        ...

    def list(self, prefix: str = "") -> Sequence[Entry]:
        """Returns all objects below a prefix, which ends in a slash, or is empty."""
        ...

    def children(self, prefix: str = "") -> tuple[Sequence[str], Sequence[Entry]]:
        """Returns one level below a prefix: names that hold objects, and the objects there."""
        ...

    def size(self, key: str) -> int | None:
        """Returns the size of an object, in bytes; None where there is none."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects, in no order; some of them where it is killed. None need be there."""
        ...


def cut(pieces: Iterable[bytes | memoryview], size: int) -> Iterable[memoryview]:
    """Cuts pieces at each multiple of `size` bytes of what they make together; copies nothing."""
    room = size
    for piece in pieces:
        view = memoryview(piece).cast("B")
        while view:
            head, view = view[:room], view[room:]
            room = room - len(head) or size
            yield head
