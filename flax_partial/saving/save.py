"""Saving, as callers see it: what they can get wrong is checked, and the save handed to a worker.

A save claims its leaves in memory, takes a snapshot, and is written as a part beside all others by
a worker, which commits it. It looks at nothing that other processes wrote: its cost is that of its
own leaves.
"""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax_partial import collector
from flax_partial.errors import EmptyStateError
from flax_partial.format.metadata import check_metadata
from flax_partial.options import SaveOptions
from flax_partial.reports import SaveReport
from flax_partial.saving.describe import describe
from flax_partial.saving.job import SaveJob, hand_over
from flax_partial.sessions import workers
from flax_partial.sessions.claims import Claims
from flax_partial.sessions.forks import check_not_forked
from flax_partial.sessions.handles import SaveHandle
from flax_partial.storage import places
from flax_partial.storage.local_place import LocalPlace
from flax_partial.storage.paths import PathLike

_DEFAULTS = SaveOptions()
# The saves that the main thread is preparing. Signals reach that thread alone: where it calls anew
# and one was not handed over, an interrupt has kept it from taking the claims back.
_of_main_thread: list[SaveJob] = []


def save(
    path: PathLike,
    state: Any,
    *,
    custom_metadata: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    replace: bool = False,
    options: SaveOptions | None = None,
    reuse: PathLike | None = None,
) -> SaveReport:
    """Adds a state to the unfinished checkpoint of `path`, and returns when it is durable.

    Args:
      path: Where the finalized checkpoint will be; until then parts wait in `<path>.partial_save`.
      state: Any JAX pytree; an empty one (`{}`) saves `custom_metadata` alone. Leaves: `jax.Array`,
        `np.ndarray`, NumPy scalars, typed PRNG keys, bool, int, float, complex, str, bytes, None,
        empty containers, `Slice`. An empty container holds a place: other saves may fill it.
      custom_metadata: JSON values under string keys. Those of several saves merge deeply; the later
        value wins.
      training: What a training loop records of itself, such as `{"step": 40}`: JSON values, which
        merge as `custom_metadata` do. The callbacks store there what they resume from.
      replace: Whether leaves that the session holds already are replaced; an error otherwise.
        Replacing some rows of a leaf that is saved in `Slice`s means saving all of them again.
      options: How to write it.
      reuse: A finalized checkpoint. Leaves that this process saved into it, and that hold the same
        to the byte, are not written again: both checkpoints share the files that hold them, and
        either may be removed. Where it is not there (any more), or its files cannot be linked to,
        everything is written.

    Returns:
      What was committed, and how long it took.

    Raises:
      CheckpointExistsError: A finalized checkpoint, or something else, is at `path`.
      KeyConflictError: A leaf is in the session already, or cannot stand beside others in one tree.
      UnsupportedLeafError: No checkpoint can hold some leaf, key, or value of `custom_metadata`.
      EmptyStateError: `state` has no leaves, and there is no `custom_metadata`.
      ForkedProcessError: This is a forked child of a process that had used JAX.
      OSError: Writing failed. Like after every other error, the session is as it was before. So it
        is after a `KeyboardInterrupt`, unless the commit had begun; the call then waits for the
        piece that is being written, of at most 64 MiB. A second interrupt does not wait.
    """
    with collector.paused():
        (job,) = _prepare(path, [state], [custom_metadata], [training], options, reuse=reuse)
    try:
        job.claim(replace=replace)
        return workers.saving.run(job.task)
    except BaseException:
        job.task.withdraw()
        raise


def save_async(
    path: PathLike,
    state: Any,
    *,
    custom_metadata: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    replace: bool = False,
    options: SaveOptions | None = None,
    reuse: PathLike | None = None,
) -> SaveHandle:
    """Like `save`, but returns as soon as the caller may donate, delete or overwrite its arrays.

    It waits for no computation. Any number may be in flight, from any threads. An error of writing
    is raised by the handle; if that is not called, by the next call on the same path.

    Args:
      path: As for `save`.
      state: As for `save`.
      custom_metadata: As for `save`.
      training: As for `save`.
      replace: As for `save`.
      options: As for `save`; `max_inflight_bytes` bounds what waits to be written.
      reuse: As for `save`.

    Returns:
      A handle with the interface of `concurrent.futures.Future`; its result is a `SaveReport`.

    Raises:
      CheckpointExistsError: As for `save`; so are the other errors about what is passed.
    """
    (handle,) = save_each_async(
        path,
        [state],
        custom_metadata=[custom_metadata],
        training=[training],
        replace=replace,
        options=options,
        reuse=reuse,
    )
    return handle


def save_each_async(
    path: PathLike,
    states: Iterable[Any],
    *,
    custom_metadata: Iterable[Mapping[str, Any] | None] | None = None,
    training: Iterable[Mapping[str, Any] | None] | None = None,
    replace: bool = False,
    options: SaveOptions | None = None,
    reuse: PathLike | None = None,
) -> list[SaveHandle]:
    """Like `save_async` of each of several states, in one call, which costs less than one for each.

    Each becomes a part of its own, with a handle and a report of its own. Their arrays are copied
    on a device, or transferred from it, all at once.

    Args:
      path: As for `save`.
      states: What to save; as for `save` each.
      custom_metadata: Of each of them, in the same order; None for none.
      training: Of each of them, likewise.
      replace: As for `save`.
      options: As for `save_async`.
      reuse: As for `save`.

    Returns:
      A handle for each. The `blocked_secs` of their reports add up to the time of this call.

    Raises:
      ValueError: There are more or fewer `custom_metadata`, or `training`, than states.
      CheckpointExistsError: As for `save`; so are the other errors about what is passed. None of
        the states is saved then.
    """
    states = list(states)
    metadata = _of_each(states, "custom_metadata", custom_metadata)
    of_training = _of_each(states, "training", training)
    jobs: list[SaveJob] = []
    try:
        with collector.paused():
            jobs = _prepare(path, states, metadata, of_training, options, reuse=reuse)
            for job in jobs:
                job.claim(replace=replace)
            may_wait = options is not None and options.max_inflight_bytes is not None
            if not may_wait:
                hand_over(jobs)
        if may_wait:
            hand_over(jobs)
    except BaseException:
        for job in jobs:
            job.task.withdraw()
        raise
    return [job.handle for job in jobs]


def _of_each(states: Sequence[Any], name: str, given: Iterable[Any] | None) -> Sequence[Any]:
    of_each = [None] * len(states) if given is None else list(given)
    if len(of_each) != len(states):
        raise ValueError(f"{len(of_each)} {name} for {len(states)} states")
    return of_each


@collector.paused()
def check(state: Any) -> None:
    """Raises what `save` would raise about a state; saves nothing, and waits for no computation.

    Args:
      state: As for `save`.

    Raises:
      KeyConflictError: Two leaves cannot stand in one tree.
      UnsupportedLeafError: No checkpoint can hold some leaf or key.
      EmptyStateError: It has no leaves.
    """
    described = describe(state, chunk_bytes=_DEFAULTS.chunk_bytes, compression=None)
    if not described.leaves:
        raise EmptyStateError(f"state {state!r} has no leaves: there is nothing to save.")
    Claims().claim(described.leaves, replace=False, is_tree=False, visible=lambda _: {})


def _prepare(
    path: PathLike,
    states: Sequence[Any],
    custom_metadata: Sequence[Mapping[str, Any] | None],
    training: Sequence[Mapping[str, Any] | None],
    options: SaveOptions | None,
    *,
    reuse: PathLike | None,
) -> list[SaveJob]:
    """Checks everything that a caller can get wrong by itself."""
    started = time.perf_counter()
    check_not_forked("save")
    where = places.resolve(path)
    earlier = None if reuse is None else places.resolve(reuse)
    if not (isinstance(where, LocalPlace) and isinstance(earlier, LocalPlace)):
        earlier = None  # an object store gives no object a second name
    options = _DEFAULTS if options is None else options
    if not isinstance(options, SaveOptions):
        raise TypeError(f"options is a SaveOptions, not {type(options).__name__}")
    checked = []
    for state, given, recorded in zip(states, custom_metadata, training, strict=True):
        metadata, of_training = check_metadata(given), check_metadata(recorded, "training")
        described = describe(
            state,
            chunk_bytes=options.chunk_bytes,
            compression=options.compression,
            share_replicas=bool(options.share_replicas),
            remember=earlier is not None,
        )
        if not (described.leaves or metadata or of_training):
            raise EmptyStateError(
                f"state {state!r} has no leaves, and there is no custom_metadata: there is nothing "
                "to save."
            )
        checked.append((described, metadata, of_training))
    jobs = [
        SaveJob(
            where,
            described,
            custom_metadata=metadata,
            training=of_training,
            options=options,
            reuse=earlier,
            started=started,
        )
        for described, metadata, of_training in checked
    ]
    if threading.current_thread() is threading.main_thread():
        for before in _of_main_thread:
            if not before.task.is_submitted:
                before.release()  # a second interrupt may have come while the first was met
        _of_main_thread[:] = jobs
    return jobs
