"""A run that could not begin keeps no other from beginning, not even in the same process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from things import files_of_at_most

from flax_partial.runs.leases import Lease, holder
from flax_partial.runs.liveness import Life
from flax_partial.storage.directory_store import DirectoryStore

if TYPE_CHECKING:
    from collections.abc import Sequence


def test_run_that_a_full_disk_kept_from_beginning_keeps_no_lock(tmp_path: Path) -> None:
    life = Life(tmp_path)
    with files_of_at_most(0), pytest.raises(OSError, match="File too large") as failed:
        life.begin()
    assert failed.value.__traceback__ is not None  # which refers to all that the call did
    life.begin()
    assert life.has_begun
    life.end()


class _DeletesNothing(DirectoryStore):
    def delete(self, keys: Sequence[str]) -> None:
        if keys:
            raise PermissionError(f"{keys} are kept")


def test_lease_is_held_where_older_ones_cannot_be_deleted(tmp_path: Path) -> None:
    store = _DeletesNothing(tmp_path, durable=False)
    for _ in range(2):
        lease = Lease(store, "running")
        assert lease.take() is None
        assert holder(store, "running") is not None
        lease.release()
    assert holder(store, "running") is None
