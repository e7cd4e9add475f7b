"""Options that adapters take beside their own arguments, and their documentation.

An adapter hands all options but its own on to `PartialCheckpointCallback`. Type checkers and
editors read them from the typed dicts here. `explicit` adds what is known at run time only: the
signature and the docstring that `help` and IPython show, and errors that name the adapter.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypedDict, TypeVar, cast

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import timedelta

    import flax_partial as fp
    from flax_partial.callbacks._groups import GroupBy
    from flax_partial.callbacks._metrics import OnMetrics
    from flax_partial.callbacks._stacked import Stacked
    from flax_partial.callbacks.finalize_hook import FinalizeHook
    from flax_partial.callbacks.policies import Policy

P = ParamSpec("P")
T = TypeVar("T")

_ENTRY = re.compile(r"  (\w+): ")


class UnscheduledOptions(TypedDict, total=False):
    """Options of `PartialCheckpointCallback`, but for what to save, and when."""

    group_by: GroupBy | None
    stacked: Stacked | None
    keep: Policy | Iterable[Policy] | None
    extras: Mapping[str, Any] | None
    custom_metadata: Mapping[str, Any] | None
    overwrite: bool
    keep_last: int | None
    monitor: str | None
    mode: Literal["min", "max", "auto"]
    save_top_k: int | None
    keep_every_n_steps: int | None
    keep_time_interval: timedelta | None
    save_on_preemption: bool
    preemption_signals: Iterable[int]
    save_on_exception: bool
    finalizer: FinalizeHook | None
    options: fp.SaveOptions | None
    reuse_unchanged: bool
    on_save_error: Literal["raise", "warn"]
    when_behind: Literal["wait", "skip"]
    on_metrics: OnMetrics | None
    progress: bool
    local: str | os.PathLike[str] | None
    local_keep_last: int
    most_uploads: int


class LoopOptions(UnscheduledOptions, total=False):
    """Options of `PartialCheckpointCallback`, but for what to save."""

    every_n_epochs: int | None
    every_n_train_steps: int | None
    train_time_interval: timedelta | None
    save_initial: bool


def explicit(
    options: type, like: Callable[..., Any], **defaults: Any
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Has a method that takes `**options` show each of them, and refuse others by its own name.

    Args:
      options: The typed dict of them.
      like: What takes them in the end; its docstring describes each of them.
      **defaults: Those of the method that differ.
    """
    named = cast("Any", options).__optional_keys__
    theirs = inspect.signature(like).parameters

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(method)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        added = [
            one.replace(kind=one.KEYWORD_ONLY, default=defaults.get(name, one.default))
            for name, one in theirs.items()
            if name in named
        ]
        known = [one.name for one in (*own, *added)][1:]

        @functools.wraps(method)
        def checked(*arguments: P.args, **options: P.kwargs) -> T:
            if unknown := sorted(options.keys() - known):
                raise TypeError(_unknown(_called(arguments[0], method), unknown[0], known))
            return method(*arguments, **cast("Any", defaults | options))

        explained = cast("Any", checked)
        explained.__signature__ = signature.replace(parameters=[*own, *added])
        explained.__doc__ = _documented(method, like, [one.name for one in added])
        return checked

    return decorate


def _called(owner: object, method: Callable[..., Any]) -> str:
    name = type(owner).__name__
    return name if method.__name__ == "__init__" else f"{name}.{method.__name__}"


def _unknown(called: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=2)
    meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{called}() has no option {name!r}.{meant} Options are: {', '.join(known)}."


def _documented(method: Callable[..., Any], like: Callable[..., Any], names: list[str]) -> str:
    """Returns the docstring of `method`, in which those of `like` stand for `options`."""
    before, entries, after = _parts_of(inspect.getdoc(method) or "")
    _, theirs, _ = _parts_of(inspect.getdoc(like) or "")
    entries.pop("options", None)
    entries.update((name, theirs[name]) for name in names if name in theirs)
    return "\n".join([*before, *(line for entry in entries.values() for line in entry), *after])


def _parts_of(doc: str) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Parts a docstring into what is before its arguments, each of these, and what is after."""
    lines = doc.splitlines()
    begin = lines.index("Args:") + 1 if "Args:" in lines else len(lines)
    end = lines.index("", begin) if "" in lines[begin:] else len(lines)
    entries: dict[str, list[str]] = {}
    name = ""
    for line in lines[begin:end]:
        if entry := _ENTRY.match(line):
            name = entry[1]
        entries.setdefault(name, []).append(line)
    return lines[:begin], entries, lines[end:]
