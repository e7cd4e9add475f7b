"""Policies say which checkpoints are kept; nothing is removed because its score is not known."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from orbax.checkpoint import v1 as ocp
from stub_trainer import Loop, begun, fitted, new_state
from test_callback import names_in

import flax_partial as fp
from flax_partial.callbacks import (
    BestN,
    EveryInterval,
    EveryNSteps,
    LatestN,
    PartialCheckpointCallback,
)
from flax_partial.callbacks._schedule import Retention
from flax_partial.callbacks.policies import SavedStep

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LOSSES = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 3.0}


def saved(scores: dict[int, float | None], **known: Any) -> list[SavedStep]:
    return [
        SavedStep(step, {} if score is None else {"loss": score}, finalized_at=60.0 * step, **known)
        for step, score in scores.items()
    ]


class Odd:
    """A policy of one's own."""

    def keep(self, saved: Sequence[SavedStep]) -> list[int]:
        return [one.step for one in saved if one.step % 2]


class BestOfTheNewest:
    """One that asks another."""

    def keep(self, saved: Sequence[SavedStep]) -> set[int]:
        return BestN(1, "loss", "min").keep(saved[-2:])


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (LatestN(2), {4, 5}),
        (LatestN(9), {1, 2, 3, 4, 5}),
        (BestN(2, "loss", "min"), {2, 4}),
        (BestN(2, "loss", "max"), {1, 3}),
        (EveryNSteps(2), {2, 4}),
        (EveryInterval(timedelta(minutes=2)), {1, 3, 5}),
        (Odd(), {1, 3, 5}),
        (BestOfTheNewest(), {4}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_policy_keeps(policy: Any, kept: set[int]) -> None:
    assert set(policy.keep(saved(dict(LOSSES)))) == kept


theirs = ocp.training.preservation_policies


def loss_of(metrics: dict[str, float]) -> float:
    return metrics["loss"]


@pytest.mark.parametrize(
    ("policy", "of_orbax"),
    [
        (LatestN(3), theirs.LatestN(3)),
        (EveryNSteps(4), theirs.EveryNSteps(4)),
        (EveryInterval(timedelta(minutes=3)), theirs.EveryNSeconds(180)),
        (BestN(3, "loss", "min"), theirs.BestN(get_metric_fn=loss_of, reverse=True, n=3)),
        (BestN(4, "loss", "max"), theirs.BestN(get_metric_fn=loss_of, n=4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_policy_keeps_what_orbaxs_own_does(policy: Any, of_orbax: Any) -> None:
    losses = [5, 2, 4, 3, 7, 10, 11, 3, 8, 3, None, 7]  # some are equal, one is not known
    steps = saved({step: loss and float(loss) for step, loss in enumerate(losses)})
    infos = [
        SimpleNamespace(
            step=one.step,
            time=datetime.fromtimestamp(one.finalized_at or 0, tz=UTC),
            metrics=dict(one.metrics) or None,
        )
        for one in steps
    ]
    are_kept = of_orbax.should_preserve(infos, context=None)
    assert set(policy.keep(steps)) == {
        one.step for one, is_kept in zip(steps, are_kept, strict=True) if is_kept
    }


@pytest.mark.parametrize(
    ("scores", "ranked_by", "kept"),
    [
        pytest.param({1: None, 2: 1.0, 3: 2.0}, {}, {1, 2}, id="no score"),
        pytest.param({1: None, 2: None, 3: None, 4: 9.0}, {}, {2, 3, 4}, id="the newest of them"),
        pytest.param({1: 1.0, 2: 2.0, 3: 3.0}, {"loss": "max"}, {2, 3}, id="ranked the other way"),
        pytest.param({1: 1.0, 2: 2.0, 3: 3.0}, {"loss": "min"}, {1}, id="ranked alike"),
        pytest.param({1: 1.0, 2: 1.0, 3: 2.0}, {}, {2}, id="of equals the newest"),
        pytest.param({1: float("inf"), 2: float("nan"), 3: 2.0}, {}, {1, 2, 3}, id="no number"),
    ],
)
def test_what_is_not_ranked_is_kept_up_to_a_number(scores: Any, ranked_by: Any, kept: Any) -> None:
    best = BestN(1, "loss", "min", max_unranked=2)
    assert best.keep(saved(scores, ranked_by=ranked_by)) == kept


def test_policies_are_combined_with_one_another_and_with_the_keywords(tmp_path: Path) -> None:
    losses: Any = {"metrics": lambda step: {"loss": LOSSES[step]}, "batches": 5}
    often: Any = {"every_n_epochs": None, "every_n_train_steps": 1}
    fitted(tmp_path / "a", keep=[BestN(1, "loss", "min"), EveryNSteps(4)], **often, **losses)
    fitted(tmp_path / "b", keep=Odd(), keep_last=2, **often, **losses)
    fitted(tmp_path / "c", save_top_k=-1, keep_last=1, **often, **losses)
    assert [fp.steps(tmp_path / name) for name in "abc"] == [[2, 4, 5], [1, 3, 4, 5], [*LOSSES]]


def test_best_of_a_policy_is_the_one_that_is_restored(tmp_path: Path) -> None:
    callback = fitted(
        tmp_path,
        keep=(BestN(1, "loss", "max"),),
        metrics=lambda step: {"loss": LOSSES[step]},
        batches=5,
        every_n_train_steps=1,
    )
    assert callback.best_model_path == str(tmp_path / "1")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"keep": LatestN}, TypeError, "no method keep"),
        ({"keep": [LatestN(1), "best"]}, TypeError, "no method keep"),
        ({"keep": 3}, TypeError, "no method keep"),
        (
            {"keep": BestN(1, "loss", "max"), "monitor": "loss"},
            ValueError,
            "the other way than BestN.*pass mode='max'",
        ),
        ({"monitor": "loss", "mode": "biggest"}, ValueError, "'min', 'max' or 'auto'"),
        ({"save_top_k": -2, "monitor": "loss"}, ValueError, "save_top_k is -2"),
    ],
)
def test_policies_without_a_meaning_are_refused(options: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        PartialCheckpointCallback("run", **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatestN(0), "LatestN.count is 0"),
        (lambda: BestN(0, "loss", "min"), "BestN.count is 0"),
        (lambda: BestN(1, "loss", "min", max_unranked=-1), "max_unranked is -1"),
        (lambda: BestN(1, "loss", "auto"), "BestN.mode is 'auto'"),  # type: ignore[arg-type]
        (lambda: EveryNSteps(0), "EveryNSteps.steps is 0"),
        (lambda: EveryInterval(timedelta(0)), "EveryInterval.interval is 0:00:00"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_policy_without_a_meaning_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


FIRST: dict[str, Any] = {"monitor": "loss", "save_top_k": 1, "keep_last": 1}


@pytest.mark.parametrize(
    "then",
    [
        pytest.param({"monitor": "val/loss"}, id="metric renamed"),
        pytest.param({"mode": "max"}, id="mode changed"),
        pytest.param({"monitor": None, "save_top_k": None}, id="without a monitor"),
    ],
)
def test_starting_restoring_and_looking_remove_nothing(tmp_path: Path, then: Any) -> None:
    often: Any = {"every_n_epochs": None, "every_n_train_steps": 1, "batches": 5}
    fitted(tmp_path, metrics=lambda step: {"loss": LOSSES[step]}, **FIRST, **often)
    assert fp.steps(tmp_path) == [2, 5]
    again = PartialCheckpointCallback(tmp_path, **FIRST | then)
    assert again.restore(new_state(0)) is not None
    assert (again.last_model_path, again.best_model_path is not None) == (str(tmp_path / "5"), True)
    trainer = begun(again)
    again.on_train_end(trainer, None)
    assert names_in(tmp_path) == ["2", "5"]


@pytest.mark.parametrize("then", [{"monitor": "val/loss"}, {"mode": "max"}], ids=str)
def test_what_ranked_otherwise_outlives_later_checkpoints(tmp_path: Path, then: Any) -> None:
    often: Any = {"every_n_epochs": None, "every_n_train_steps": 1}
    both = {"metrics": lambda step: dict.fromkeys(("loss", "val/loss"), 10.0 - step)}
    fitted(tmp_path, batches=5, metrics=lambda step: {"loss": LOSSES[step]}, **FIRST, **often)
    again = PartialCheckpointCallback(tmp_path, **often, **FIRST | then)
    state, step = again.restore(new_state(0)) or (None, 0)
    Loop(again, batches=9, **both).resume(state, step).fit()
    best = 6 if "mode" in then else 9
    assert fp.steps(tmp_path) == sorted({2, 5, best, 9})


def test_no_checkpoint_is_looked_into_where_steps_are_enough() -> None:
    of: Any = dict.fromkeys(("keep", "keep_last", "monitor", "save_top_k"))
    of |= {"mode": "min", "keep_every_n_steps": 3, "keep_time_interval": None}
    assert not Retention.of(**of | {"keep_last": 2}).looks_inside
    assert Retention.of(**of | {"keep": Odd()}).looks_inside
