"""The callback's pure rules: when to save, what to keep, how to group, what is complete."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback
from flax_partial.callbacks._groups import cut, layerwise
from flax_partial.callbacks._leaves import flatten, leaf_name
from flax_partial.callbacks._schedule import Retention, Schedule
from flax_partial.callbacks.policies import SavedStep
from flax_partial.runs.completeness import closing, missing, saved
from flax_partial.subtrees import joined

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs is 0"),
        ({"every_n_train_steps": -1}, "every_n_train_steps is -1"),
        ({"every_n_epochs": None}, "nothing would be saved"),
        ({"keep_last": 0}, "keep_last is 0"),
        ({"save_top_k": 3}, "Pass monitor="),
        ({"monitor": "loss", "save_top_k": 0}, "save_top_k is 0"),
        ({"mode": "best"}, "mode is 'best'"),
        ({"preemption_signals": [9]}, "listen to SIGKILL"),
        ({"preemption_signals": [999]}, "999 is not a valid Signals"),
        ({"on_save_error": "ignore"}, "on_save_error is 'ignore'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_without_a_meaning_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartialCheckpointCallback("run", **options)


def test_callbacks_of_one_directory_agree_on_what_to_keep(tmp_path: Path) -> None:
    first = PartialCheckpointCallback(tmp_path, keep_last=3)
    second = PartialCheckpointCallback(tmp_path, finalizer=first.finalizer)
    third = PartialCheckpointCallback(tmp_path, keep_last=2, finalizer=first.finalizer)
    first.setup(None, None, "fit")
    second.setup(None, None, "fit")
    with pytest.raises(ValueError, match="Give these options to one of them only"):
        third.setup(None, None, "fit")


def test_best_needs_a_monitor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="monitor=None"):
        PartialCheckpointCallback(tmp_path).restore(which="best")
    with pytest.raises(ValueError, match="which='newest'"):
        PartialCheckpointCallback(tmp_path, monitor="loss").restore(which="newest")


def test_schedule_counts_epochs_from_zero_and_steps_from_one() -> None:
    schedule = Schedule(every_n_epochs=2, every_n_train_steps=5)
    assert [epoch for epoch in range(6) if schedule.is_epoch_due(epoch)] == [1, 3, 5]
    assert [step for step in range(1, 12) if schedule.is_step_due(step)] == [5, 10]


@given(
    steps=st.sets(st.integers(1, 99), min_size=1),
    scores=st.dictionaries(st.integers(1, 99), st.floats(-5, 5)),
    keep_last=st.none() | st.integers(1, 5),
    top=st.none() | st.integers(1, 5),
    mode=st.sampled_from(["min", "max"]),
)
def test_what_is_kept(
    steps: set[int], scores: dict[int, float], keep_last: int | None, top: int | None, mode: Any
) -> None:
    retention = Retention.of(
        keep=None,
        keep_last=keep_last,
        monitor="loss",
        mode=mode,
        save_top_k=top,
        keep_every_n_steps=None,
        keep_time_interval=None,
    )
    saved = [
        SavedStep(step, {"loss": scores[step]} if step in scores else {}) for step in sorted(steps)
    ]
    expired = retention.expired(saved)
    kept = steps - set(expired)
    assert expired == sorted(expired)
    assert max(steps) in kept
    assert set(sorted(steps)[-(keep_last or 1) :]) <= kept
    if keep_last is None and top is None:
        assert kept == steps
        return
    unranked = [step for step in sorted(steps) if step not in scores]
    assert len(kept) <= (keep_last or 1) + (top or 0) + min(5, len(unranked))
    if top is not None:
        assert set(unranked[-5:]) <= kept
    sign = 1 if mode == "min" else -1
    scored = sorted(sign * scores[step] for step in steps if step in scores)
    for score in scored[: top or 0]:
        assert any(score == sign * scores[step] for step in kept if step in scores)


def groups_of(tree: Any) -> dict[str, list[str]]:
    leaves = flatten(tree)
    groups = cut(leaves, layerwise(leaves))
    return {group: [leaf_name(path) for path, _ in group_of] for group, group_of in groups.items()}


def test_layers_of_optax_state_are_those_of_their_parameters() -> None:
    params = {
        "embed": {"table": jnp.ones(2)},
        "decoder": {"layers": [{"q": jnp.ones(2), "mlp": [jnp.ones(2)]} for _ in range(2)]},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    groups = groups_of({"params": params, "opt_state": optimizer.init(params), "step": 3})
    layers = ("decoder.layers.0", "decoder.layers.1", "embed")
    of_moments = [f"opt_state.{name}" for name in ("0", "1", *layers)]
    assert list(groups) == [*of_moments, *(f"params.{name}" for name in layers), "step"]
    assert groups["opt_state.decoder.layers.1"] == [
        f"opt_state.1.0.{moment}.decoder.layers.1.{name}"
        for moment in ("mu", "nu")
        for name in ("mlp.0", "q")
    ]


@given(
    st.recursive(
        st.integers(0, 9) | st.none(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from("abc") | st.integers(0, 3).map(str), inner, max_size=3
            )
            | st.tuples(inner, inner)
        ),
        max_leaves=12,
    )
)
def test_groups_have_every_leaf_once_at_its_own_path(tree: Any) -> None:
    leaves = flatten(tree)
    groups = cut(leaves, layerwise(leaves))
    again = [item for group in groups.values() for item in flatten(joined(group))]
    assert sorted(again, key=str) == sorted(leaves, key=str)


SAVED_X, SAVED_Y = saved(callback="a", group="x"), saved(callback="b", group="y")


def done(callback: str, *groups: str, callbacks: str = "a") -> dict[str, Any]:
    """What a callback says in its last part, of the callbacks with names of one letter."""
    return closing(callbacks, callback=callback, groups=groups)


@pytest.mark.parametrize(
    ("sessions", "lacks"),
    [
        pytest.param([SAVED_X], "step 5 was not completely written", id="no list"),
        pytest.param([done("a")], "no callback had anything to save", id="nothing saved"),
        pytest.param([SAVED_X, done("a", "x")], None, id="complete"),
        pytest.param([SAVED_X, done("a", "x", "y", "z")], "it lacks y, z", id="groups missing"),
        pytest.param(
            [SAVED_X, done("a", "x", callbacks="ab")],
            "step 5 was not completely written by b in process 0",
            id="another callback was not done",
        ),
        pytest.param(
            [SAVED_X, SAVED_Y, done("a", "x", callbacks="ba"), done("b", "y", callbacks="ab")],
            None,
            id="two callbacks",
        ),
        pytest.param(
            [SAVED_X, done("a", "x") | {"processes": 2}],
            "step 5 was not completely written by a in process 1",
            id="another process was not done",
        ),
    ],
)
def test_what_a_session_lacks(tmp_path: Path, sessions: Any, lacks: str | None) -> None:
    for session in sessions:
        fp.save(tmp_path / "5", {}, custom_metadata={"step": 5, "session": session})
    status = fp.status(tmp_path / "5")
    assert missing(status, 5) == lacks
    assert "was not saved by callbacks in step 6" in str(missing(status, 6))


def test_importing_the_callbacks_imports_neither_flax_nor_optax() -> None:
    code = "import flax_partial.callbacks, sys; print({'flax', 'optax'} & set(sys.modules))"
    command = [sys.executable, "-P", "-c", code]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "set()\n"
