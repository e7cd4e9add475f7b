"""Makes the parts of a session one checkpoint.

Finalize moves nothing: it derives the root files from the parts, makes them durable, and renames
the session. Killed anywhere before the rename it has changed nothing that counts, and starts over
from the parts.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

from jax.profiler import TraceAnnotation

from flax_partial import collector
from flax_partial.distributed.agreement import DEFAULT_TIMEOUT_SECS, agree, count, index
from flax_partial.errors import (
    CorruptCheckpointError,
    IncompleteCheckpointError,
    KeyConflictError,
    NoSessionError,
    first_few,
)
from flax_partial.finalizing.deadline import Deadline, check_timeout
from flax_partial.format.derive import derive
from flax_partial.format.keypaths import KeyPath
from flax_partial.format.merge import MergePlan, merge
from flax_partial.format.model import Contents, Leaf, Part, data_path
from flax_partial.loading.checkpoint import described, metadata
from flax_partial.reports import CheckpointMetadata
from flax_partial.sessions import workers
from flax_partial.sessions.forks import check_not_forked
from flax_partial.sessions.handles import FinalizeHandle
from flax_partial.sessions.registry import Session, failed_parts, forget, session_of
from flax_partial.sessions.workers import Task
from flax_partial.storage import places
from flax_partial.storage.paths import PathLike
from flax_partial.storage.place import Place

_MOST_NAMED = 20  # leaves that an error lists


def finalize(
    path: PathLike,
    *,
    expect: Iterable[str] | None = None,
    processes: Iterable[int] | None = None,
    timeout_secs: float | None = None,
) -> CheckpointMetadata:
    """Merges the parts saved for `path` into one checkpoint: it appears there complete, or not.

    Waits for this process's saves in flight. Of two that run at once, one commits.

    Args:
      path: The checkpoint, or its session `<path>.partial_save`.
      expect: Names of leaves or subtrees that must be there, keys joined with a dot (or a slash);
        where several processes call this, what each of them expects must be.
      processes: Indices of the processes that call this under `jax.distributed`; all of them if
        None. The first of them finalizes when the others have called it, and all return, or raise
        the same. With `expect` and None it waits for no process, only for what it expects.
      timeout_secs: For how many seconds to wait: for this process's saves in flight, for other
        processes to call this and to end their saves, and for leaves that are missing. None: for
        saves as long as they take, for other processes to call it 90 s, for leaves not at all.

    Returns:
      What the checkpoint holds.

    Raises:
      CheckpointExistsError: Something is at `path` already; the session, if any, is kept.
      NoSessionError: There is no session.
      IncompleteCheckpointError: Leaves, or pieces of leaves, are missing, or some save had not
        ended when time was up; the session is kept.
      KeyConflictError: The parts do not form one tree; the session is kept.
      CorruptCheckpointError: A part is damaged; the session is kept.
      OSError: Writing failed; the session is kept, and finalize can be called again.
    """
    return workers.finalizing.run(_task(path, expect, processes, timeout_secs))


def finalize_async(
    path: PathLike,
    *,
    expect: Iterable[str] | None = None,
    processes: Iterable[int] | None = None,
    timeout_secs: float | None = None,
) -> FinalizeHandle:
    """Like `finalize`, in the background.

    Args:
      path: As for `finalize`.
      expect: As for `finalize`.
      processes: As for `finalize`.
      timeout_secs: As for `finalize`.

    Returns:
      A handle with the interface of `concurrent.futures.Future`; its result is that of `finalize`,
      and it raises what `finalize` would.
    """
    task = _task(path, expect, processes, timeout_secs)
    try:
        workers.finalizing.submit(task)
    except BaseException:
        task.withdraw()  # else an interrupted call would finalize, some time later
        raise
    return cast("FinalizeHandle", task.handle)


def _task(
    path: PathLike,
    expect: Iterable[str] | None,
    processes: Iterable[int] | None,
    timeout_secs: float | None,
) -> Task[CheckpointMetadata]:
    """Checks what a caller can get wrong; returns what a worker has to do."""
    check_not_forked("finalize")
    where = places.resolve(path)
    expected = _names(expect)
    check_timeout(timeout_secs)
    chosen = None if processes is None else tuple(processes)

    def work(task: Task[CheckpointMetadata]) -> CheckpointMetadata:
        return _finalize(where, expected, chosen, timeout_secs, task)

    return Task(work, FinalizeHandle())


def _finalize(
    where: Place,
    expected: tuple[str, ...],
    processes: tuple[int, ...] | None,
    timeout_secs: float | None,
    task: Task[CheckpointMetadata],
) -> CheckpointMetadata:
    participants = _participants(processes)
    session = session_of(where)
    deadline = Deadline(task, timeout_secs, IncompleteCheckpointError)

    def finish_saves() -> tuple[str, ...]:
        deadline.wait_for_saves(session)
        session.raise_unseen()
        return expected

    committed: list[Contents] = []

    def commit(expected_by: Mapping[int, Sequence[str]]) -> None:
        names = [*dict.fromkeys(name for listed in expected_by.values() for name in listed)]
        where.require_absent()
        if timeout_secs:
            _wait_for_leaves(where, names, deadline, task)
        committed.append(_commit_alone(session, names, deadline, task))

    agree(
        f"finalize {where.final}",
        ready=finish_saves,
        act=commit,
        participants=participants,
        awaited=() if expected and processes is None else participants,
        timeout_secs=DEFAULT_TIMEOUT_SECS if timeout_secs is None else timeout_secs,
        sleep=task.sleep,
    )
    forget(session)
    with collector.paused():
        return described(where, committed[0]) if committed else metadata(where.final)


def _names(expect: Iterable[str] | None) -> tuple[str, ...]:
    if isinstance(expect, str):
        return (expect,)
    names = tuple(expect or ())
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"expect holds names of leaves or subtrees, not {name!r}")
    return names


def _commit_alone(
    session: Session, expected: Sequence[str], deadline: Deadline, task: Task[Any]
) -> Contents:
    """Makes the checkpoint once no save into its session is under way."""
    where = session.where
    try:
        task.check()
        with deadline.locked(where), collector.paused():
            task.check()
            session.remove_failed()
            with TraceAnnotation("flax_partial.finalize", checkpoint=where.final.name):
                return _commit(session, expected)
    except NoSessionError:
        where.require_absent()  # another process has finalized it while this one waited
        raise


def _wait_for_leaves(
    where: Place, expected: Sequence[str], deadline: Deadline, task: Task[Any]
) -> None:
    """Waits until nothing is missing, or time is up. Holds no lock: saves have to go on."""
    pause = 0.01
    known: dict[str, Part] = {}
    while True:
        known = where.read_parts(known=known, failed=failed_parts(where)).committed
        plan = merge(known)
        if known and not plan.missing and not _lacking(expected, plan.leaves):
            return
        left_secs = deadline.left_secs
        if not left_secs:
            return
        task.sleep(min(pause, left_secs))
        pause = min(pause * 1.5, 1.0)


def _commit(session: Session, expected: Sequence[str]) -> Contents:
    """Makes the checkpoint of a locked session."""
    where = session.where
    where.require_absent()
    committed_ns: int | None = None
    while committed_ns is None:
        found = where.read_parts(failed=session.not_removed)
        _require_undamaged(where, found.damaged)
        plan = merge(found.committed)
        committed_ns = found.decided_ns  # by a finalize that ended before it was done
        if committed_ns is None:
            _require_whole(where, plan, expected)
            committed_ns = where.decide(found.committed, committed_ns=time.time_ns())
    derived = derive(plan, committed_ns=committed_ns)
    where.commit_checkpoint(
        root_files=derived.root_files, contents=derived.contents_bytes, torn=found.torn
    )
    return derived.contents


def _require_undamaged(where: Place, damaged: Mapping[str, str]) -> None:
    """What a damaged part held is not known: to go on without it might bring back older values."""
    if damaged:
        raise CorruptCheckpointError(
            f"{where.session} has committed parts that are damaged:\n"
            f"{_listed([*damaged.values()])}\n"
            "Abort it; or move these parts away, and save again what they held."
        )


def _require_whole(where: Place, plan: MergePlan, expected: Sequence[str]) -> None:
    if plan.conflicts:
        raise KeyConflictError(
            f"{where.session} does not form one checkpoint:\n" + _listed(plan.conflicts)
        )
    missing = [*_lacking(expected, plan.leaves), *plan.missing]
    if missing:
        raise IncompleteCheckpointError(
            f"{where.session} is not complete; missing:\n{_listed(missing)}\n"
            "Save what is missing and finalize again. Nothing was lost."
        )
    lost = _lost(where, plan)
    if lost:
        raise CorruptCheckpointError(
            f"{where.session} has lost data that was saved:\n{_listed(lost)}\n"
            "Save these leaves again with replace=True."
        )
    if not plan.leaves:
        raise IncompleteCheckpointError(f"{where.session} holds no leaf: save something.")


def _lost(where: Place, plan: MergePlan) -> list[str]:
    """Returns which leaves have lost data in a part: a file is missing, or cut short."""
    sizes: dict[str, int] = {}
    lost = []
    for leaf, sources in zip(plan.leaves, plan.sources, strict=True):
        for part, placed in sources:
            end = max((sum(place) for place in placed if not isinstance(place, bytes)), default=0)
            if end and part not in sizes:
                sizes[part] = where.size_of_data(data_path(part))
            if end and end > sizes[part]:
                lost.append(f"{leaf.name}, in {part}")
                break
    return lost


def _lacking(expected: Sequence[str], leaves: Iterable[Leaf]) -> list[str]:
    """Returns which of the expected names are neither a leaf nor a subtree."""
    wanted = set(expected)
    lengths = frozenset(map(len, wanted))
    for leaf in leaves if wanted else ():
        wanted.difference_update(_ancestry(leaf, lengths))
    return [name for name in expected if name in wanted]


def _ancestry(path: KeyPath, lengths: frozenset[int]) -> Iterator[str]:
    """The names of a leaf, and of the subtrees around it, that are of the given lengths."""
    ends = accumulate(path.texts, lambda end, text: end + 1 + len(text), initial=-1)
    inside = lengths.intersection(ends)
    return (joined[:end] for joined in (path.name, "/".join(path.texts)) for end in inside)


def _listed(lines: Sequence[str]) -> str:
    shown = first_few(lines, most=_MOST_NAMED, count=len(lines))
    return "\n".join(f"  {line}" for line in shown)


def _participants(processes: Iterable[int] | None) -> tuple[int, ...]:
    """Returns the ascending indices of the processes that take part.

    Raises:
      ValueError: There is no such process, or this one is not among them.
    """
    everyone = tuple(range(count()))
    if processes is None:
        return everyone
    chosen = tuple(sorted(set(processes)))
    if not set(chosen).issubset(everyone):
        raise ValueError(f"processes are 0 to {count() - 1}, not {list(chosen)}")
    if index() not in chosen:
        raise ValueError(f"process {index()} calls finalize, but is not among {list(chosen)}")
    return chosen
