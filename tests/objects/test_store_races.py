"""Saves, finalizes and aborts of several processes at once: each was told what is the case."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import store_races
from stores import Request, another_process, memory, requests_through
from things import MOST_SECS

import flax_partial as fp
from flax_partial.storage.object_place import StorePlace
from flax_partial.storage.object_store import ObjectStore


@pytest.mark.parametrize("seed", range(40))
def test_what_racing_processes_are_told_holds(seed: int) -> None:
    another_process()
    url = memory()
    calls = store_races.race(lambda me: f"{url}?p={me}", seed)
    store_races.check(url, calls)


@pytest.mark.parametrize("seed", range(10))
def test_what_they_are_told_holds_where_requests_are_slow_and_processes_die(seed: int) -> None:
    store_races.one_trial(seed, memory() + "?p={me}", delay_secs=0.005, kill_share=0.03)


def finalize_while_a_save_is_written(url: str) -> str:
    """Lets a finalize list the parts just before a save puts its table; what the save was told."""
    another_process()
    fp.save(url, {"first": 1})
    fenced, tabled = threading.Event(), threading.Event()
    ending = threading.Thread(target=lambda: fp.finalize(f"{url}?p=1"))

    def hook(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
        key = str(arguments[1:2])
        if name == "put" and "part.json" in key:
            ending.start()
            assert fenced.wait(MOST_SECS)
            try:
                return request()
            finally:
                tabled.set()
        if name == "put_new" and ".verdict" in key:
            fenced.set()  # it has put its fence, and listed the parts
            assert tabled.wait(MOST_SECS)
        return request()

    with requests_through(hook):
        try:
            fp.save(url, {"late": 2})
        except fp.CheckpointExistsError:
            return "finalized before"
        else:
            return "ok"
        finally:
            ending.join()


def test_a_save_that_meets_a_finalize_is_told_what_became_of_it() -> None:
    url = memory()
    assert finalize_while_a_save_is_written(url) == "finalized before"
    assert fp.load(url) == {"first": 1}
    assert fp.verify(url).ok


def test_without_its_last_listing_that_save_would_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StorePlace, "_settle", lambda _place, _name: None)
    url = memory()
    assert finalize_while_a_save_is_written(url) == "ok"
    assert fp.load(url) == {"first": 1}


def test_a_finalize_beside_an_abort_is_told_of_it_whatever_it_saw_deleted() -> None:
    another_process()
    url = memory()
    fp.save(url, {"lost": np.ones(2000)})
    deleted, listed = threading.Event(), threading.Event()
    aborting = threading.Thread(target=lambda: fp.abort(f"{url}?p=1"))
    delete = ObjectStore.delete

    def hook(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
        if name == "delete":  # the abort's: the part's data is gone, and its table is there
            store, keys = arguments
            delete(store, [key for key in keys if "part.json" not in key])
            deleted.set()
            assert listed.wait(MOST_SECS)
        if name == "list" and arguments[1:] == ("state/",) and aborting.ident is None:
            aborting.start()
            assert deleted.wait(MOST_SECS)
            try:
                return request()
            finally:
                listed.set()
        return request()

    with requests_through(hook), pytest.raises(fp.NoSessionError):
        fp.finalize(url)
    aborting.join()
