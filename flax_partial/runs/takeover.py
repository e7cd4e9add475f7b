"""Which tier uploads into a run's directory: of several, the one that took it over last.

A tier is a directory on the disk of one machine, with an identity that it keeps in

    <tier>/timeline/tier.json       {"id": "6f0c...", "directory": "s3://bucket/run"}

The run's directory, which may be in an object store, holds an object for each run that has begun to
upload there, put if absent, with the next number:

    <directory>/timeline/uploads.7  {"tier": "6f0c...", "host": "node7", "process": 4711, ...}

Of two tiers the one with the larger number may upload. The other one finds that out: an upload
opens its session, and then lists these objects. Who takes over puts its own, and then lists the
sessions, and ends those that it finds. So at least one of the two sees the other: what the first
one is about to publish is published before, or dropped.
"""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING

from flax_partial.errors import CheckpointExistsError, StoreError
from flax_partial.runs import leases
from flax_partial.runs.timeline import FOLDER
from flax_partial.storage.directory_store import DirectoryStore
from flax_partial.storage.paths import without_secrets
from flax_partial.storage.store_path import StorePath

if TYPE_CHECKING:
    from pathlib import Path

    from flax_partial.storage.store import Store
    from flax_partial.storage.store_path import AnyPath

_TIER = f"{FOLDER}/tier.json"
_UPLOADS = f"{FOLDER}/uploads"  # the names of these objects, without their numbers
_ATTEMPTS = 50


def identity(tier: Path) -> str:
    """Returns the identity of a tier; empty where it has none yet."""
    return _read(DirectoryStore(tier).get(_TIER)).get("id", "")


def identify(tier: Path, directory: AnyPath) -> str:
    """Gives a tier a new identity, if it has none that belongs to a run's directory.

    Raises:
      CheckpointExistsError: It belongs to another one.
    """
    found = _read(DirectoryStore(tier).get(_TIER))
    recorded = without_secrets(found.get("directory", ""))
    if found and recorded != without_secrets(str(directory)):
        raise CheckpointExistsError(
            f"{tier} is the local tier of {recorded}, not of {directory}: give each run a tier of "
            "its own."
        )
    return found.get("id") or renew(tier, directory)


def renew(tier: Path, directory: AnyPath) -> str:
    """Gives a tier another identity."""
    new = uuid.uuid4().hex
    value = {"id": new, "directory": without_secrets(str(directory))}
    DirectoryStore(tier).put(_TIER, [json.dumps(value).encode()])
    return new


class Uploads:
    """Who uploads into a run's directory."""

    def __init__(self, directory: AnyPath) -> None:
        """Takes the directory, which need not exist."""
        self._directory = directory

    @property
    def _store(self) -> Store:
        if isinstance(self._directory, StorePath):
            return self._directory.store
        self._directory.mkdir(parents=True, exist_ok=True)
        return DirectoryStore(self._directory)

    def _newest(self) -> int:
        return max(leases.numbers(self._store, _UPLOADS), default=0)

    def tier(self) -> str:
        """Returns the identity of the tier that took the directory over last; empty if none did."""
        newest = self._newest()
        return _read(self._store.get(_key(newest))).get("tier", "") if newest else ""

    def take_over(self, tier: str) -> int:
        """Has a tier be the one that uploads; returns the number by which it is known."""
        for _ in range(_ATTEMPTS):
            number = self._newest() + 1
            about = {"tier": tier, **leases.about_this_process(), "by": uuid.uuid4().hex}
            data = json.dumps(about).encode()
            if self._store.put_new(_key(number), data):
                return number
        raise StoreError(
            f"{self._directory}: in each of {_ATTEMPTS} tries another run with a local tier took "
            "it over first. Let one run at a time train there; others need their own directories."
        )

    def is_newest(self, number: int) -> bool:
        """Whether no other run has taken the directory over since `take_over` gave this number."""
        return self._newest() == number


def _key(number: int) -> str:
    return f"{_UPLOADS}.{number}"


def _read(data: bytes | None) -> dict[str, str]:
    found = json.loads(data) if data else {}
    return found if isinstance(found, dict) else {}
