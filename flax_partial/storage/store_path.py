"""Paths in object stores, as public results have them."""

import functools
from collections.abc import Iterator
from pathlib import Path

from flax_partial.storage.object_store import Url, open_store, parse
from flax_partial.storage.store import Store


@functools.total_ordering
class StorePath:
    """A place in an object store, by its URL; works like a `pathlib.Path` where that makes sense.

    `str` gives the URL. It is no `os.PathLike`: what opens files cannot open this.
    """

    __slots__ = ("_url",)

    def __init__(self, url: "str | StorePath") -> None:
        """Takes a URL, such as `s3://bucket/run/12`.

        Raises:
          ValueError: It names no bucket, or a key that no store takes.
        """
        self._url: Url = parse(str(url))

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
        joined = f"{self._url.key}/{name}" if self._url.key else str(name)
        return StorePath(str(self._url._replace(key=joined)))

    def __fspath__(self) -> str:
        raise TypeError(
            f"{self} is in an object store, no path of a file system: read it by its methods, or "
            "pass str() of it to what takes URLs"
        )

    @property
    def name(self) -> str:
        """The last segment; empty at a bucket's root."""
        return self._url.key.rpartition("/")[2]

    @property
    def parent(self) -> "StorePath":
        """The place around it; at a bucket's root itself."""
        return StorePath(str(self._url._replace(key=self._url.key.rpartition("/")[0])))

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
