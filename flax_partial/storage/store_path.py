"""Paths in object stores, as public results have them."""

import functools
from collections.abc import Iterator
from pathlib import Path

from flax_partial.storage.object_store import open_store
from flax_partial.storage.store import Store
from flax_partial.storage.urls import Url, is_url, parse


@functools.total_ordering
class StorePath:
    """A place in an object store, by its URL; works like a `pathlib.Path` where that makes sense.

    `str` gives the URL, with `***` for each secret among its parameters: pass the path itself on.
    What opens files cannot open this.
    """

    __slots__ = ("_url",)

    def __init__(self, url: "str | StorePath") -> None:
        """Takes a URL, such as `s3://bucket/run/12`.

        Raises:
          ValueError: It names no bucket, or a key that no store takes; or a secret in it is hidden.
        """
        self._url: Url = url._url if isinstance(url, StorePath) else parse(url)  # noqa: SLF001

    def _at(self, key: str) -> "StorePath":
        found = StorePath(self)
        found._url = self._url.at(key)
        return found

    def __str__(self) -> str:
        return str(self._url)

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __hash__(self) -> int:
        return hash(self._url)

    def __eq__(self, other: object) -> bool:
        return self._url == other._url if isinstance(other, StorePath) else NotImplemented

    def __lt__(self, other: object) -> bool:
        return self._url < other._url if isinstance(other, StorePath) else NotImplemented

    def __truediv__(self, name: str) -> "StorePath":
        return self._at(f"{self._url.key}/{name}" if self._url.key else str(name))

    def __fspath__(self) -> str:
        raise TypeError(
            f"{self} is in an object store, no path of a file system: read it by its methods, or "
            "pass its URL to what takes URLs"
        )

    @property
    def name(self) -> str:
        """The last segment; empty at a bucket's root."""
        return self._url.key.rpartition("/")[2]

    @property
    def parent(self) -> "StorePath":
        """The place around it; at a bucket's root itself."""
        return self._at(self._url.key.rpartition("/")[0])

    @property
    def parents(self) -> "tuple[StorePath, ...]":
        """The places around it, the nearest first."""
        found: list[StorePath] = []
        place = self
        while place.parent != place:
            place = place.parent
            found.append(place)
        return tuple(found)

    def with_name(self, name: str) -> "StorePath":
        """Returns the place beside it of that name."""
        return self.parent / name

    def absolute(self) -> "StorePath":
        """Returns itself: a URL depends on no working directory."""
        return self

    def resolve(self) -> "StorePath":
        """Returns itself: there are no links."""
        return self

    def samefile(self, other: "str | Path | StorePath") -> bool:
        """Whether another path is the same place, by its URL without parameters."""
        if isinstance(other, Path):
            return False
        return str(self).partition("?")[0] == str(other).partition("?")[0]

    @property
    def store(self) -> Store:
        """The objects below it."""
        return open_store(self._url)

    def exists(self) -> bool:
        """Whether it is an object, or objects are below it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether it is an object."""
        return bool(self.name) and self.parent.store.size(self.name) is not None

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        return any(self.store.children())

    def iterdir(self) -> Iterator["StorePath"]:
        """Yields what is one level below it, sorted."""
        names, objects = self.store.children()
        return iter(sorted(self / name for name in {*names, *(one.key for one in objects)}))

    def read_bytes(self) -> bytes:
        """Returns the content of an object.

        Raises:
          FileNotFoundError: There is none.
        """
        data = self.parent.store.get(self.name) if self.name else None
        if data is None:
            raise FileNotFoundError(f"{self}: there is no such object")
        return data

    def read_text(self, encoding: str = "utf-8") -> str:
        """Returns the content of an object as text.

        Raises:
          FileNotFoundError: There is none.
        """
        return self.read_bytes().decode(encoding)


AnyPath = Path | StorePath
"""The path of something, as public results have it."""


def in_store(path: object) -> StorePath | None:
    """Takes a path as a user gives it; returns None for one that is in no object store.

    Raises:
      ValueError: It is a URL, and names nothing.
    """
    if isinstance(path, StorePath):
        return path
    return StorePath(path) if isinstance(path, str) and is_url(path) else None
