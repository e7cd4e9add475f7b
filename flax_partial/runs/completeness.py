"""What parts record of their checkpoint, so that a later process can tell if all are there.

Each part carries, in what it records of training, the step that it belongs to and the group that it
holds. The last part that a callback saves in a step, which may hold no leaf, lists all its groups.
Merged over the parts of a session this is

    {"step": 40, "epoch": 3,
     "session": {"processes": 1, "callbacks": ["params", "opt_state"],
                 "saved": {"params": {"0": {"params.blocks.0": true, ...}}, ...},
                 "expected": {"params": {"0": ["params.blocks.0", ...]}, ...}}}

with `"0"` the process that saved. A session is complete when every callback of every process has
listed its groups, all of them were saved, and all parts are of the session's own step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import jax

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from flax_partial.reports import SessionStatus


class Recorded(Protocol):
    """What describes a part, a session or a checkpoint."""

    @property
    def custom_metadata(self) -> dict[str, Any]:
        """The user's own."""

    @property
    def training(self) -> dict[str, Any]:
        """What a training loop recorded of itself."""


def recorded(of: Recorded) -> dict[str, Any]:
    """Returns what is recorded of training.

    Callbacks did that in the custom metadata up to version 0.1. A loop without them may do so.
    """
    return of.training or of.custom_metadata


def is_by_callbacks(recorded: Mapping[str, Any]) -> bool:
    """Whether callbacks have recorded it, and so what is to come."""
    session = recorded.get("session")  # perhaps the user's own, and of any type
    return isinstance(session, dict) and isinstance(session.get("saved"), dict)


def saved(*, callback: str, group: str) -> dict[str, Any]:
    """Returns what stands under "session" in the part that holds a group."""
    return {"saved": {callback: {str(jax.process_index()): {group: True}}}}


def closing(callbacks: Iterable[str], *, callback: str, groups: Sequence[str]) -> dict[str, Any]:
    """Returns what stands under "session" in a callback's last part: all that it saves in a step.

    Args:
      callbacks: All callbacks that save into the checkpoint.
      callback: The one that is done.
      groups: Its groups, in the order in which they were saved.
    """
    return {
        "processes": jax.process_count(),
        "callbacks": sorted(callbacks),
        "expected": {callback: {str(jax.process_index()): list(groups)}},
    }


def missing(status: SessionStatus, step: int) -> str | None:
    """Returns why a session is not the checkpoint of `step`; None if it lacks nothing."""
    strangers = [part.name for part in status.parts if recorded(part).get("step") != step]
    if strangers:
        return f"its part {strangers[0]} was not saved by callbacks in step {step}"
    session = recorded(status).get("session", {})
    if "callbacks" not in session:
        return f"step {step} was not completely written"
    if not session.get("saved"):
        return "no callback had anything to save"
    absent: list[str] = []
    for callback in session["callbacks"]:
        for process in map(str, range(session["processes"])):
            expected = session.get("expected", {}).get(callback, {}).get(process)
            if expected is None:
                return f"step {step} was not completely written by {callback} in process {process}"
            saved = session.get("saved", {}).get(callback, {}).get(process, {})
            absent.extend(group for group in expected if group not in saved)
    return f"it lacks {', '.join(absent)}" if absent else None
