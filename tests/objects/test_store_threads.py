"""Threads of one process that end one session at once, in a store: one after the other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from stores import Request, another_process, memory, requests_through

import flax_partial as fp


@pytest.mark.parametrize("other", [fp.finalize, fp.abort])
def test_a_finalize_is_not_disturbed_by_another_thread_that_ends_its_session(other: Any) -> None:
    another_process()
    url, has_begun = memory(), threading.Event()
    fp.save(url, {"a": 1})
    with ThreadPoolExecutor(1) as pool:

        def hook(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
            if name == "put_new" and "contents.json" in arguments[1] and not has_begun.is_set():
                has_begun.set()
                ending = pool.submit(other, url)
                with pytest.raises((TimeoutError, fp.CheckpointExistsError)):
                    ending.result(0.2)  # it waits
            return request()

        with requests_through(hook):
            fp.finalize(url)
    assert has_begun.is_set()
    assert fp.load(url) == {"a": 1}
