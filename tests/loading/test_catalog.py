"""Paths as users give them, and which directories of a run are steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from things import stored

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback, checkpointing

if TYPE_CHECKING:
    from collections.abc import Callable

STATE = {"w": np.arange(3.0)}

CALLS: dict[str, Callable[[Any], Any]] = {
    "save": lambda path: fp.save(path, STATE),
    "save_async": lambda path: fp.save_async(path, STATE).result(),
    "finalize": fp.finalize,
    "finalize_async": lambda path: fp.finalize_async(path).result(),
    "status": fp.status,
    "abort": fp.abort,
    "load": fp.load,
    "metadata": fp.metadata,
    "verify": fp.verify,
    "remove": fp.remove,
    "steps": fp.steps,
    "latest": fp.latest,
    "reuse": lambda path: fp.save("run/1", STATE, reuse=path),
    "callback": PartialCheckpointCallback,
    "shared hook": lambda path: PartialCheckpointCallback(path, finalizer=FinalizeHook()),
    "checkpointing": checkpointing,
}
URLS: dict[str, Any] = {
    "hdfs": "hdfs://name/run",
    "S3": "S3://bucket/run/1",
    "file": "file:///tmp/run",
    "a path": Path("gs://bucket/run"),  # of which one slash is left
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("url", URLS)
def test_a_url_that_nothing_serves_is_refused_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is a URL"):
        CALLS[call](URLS[url])
    assert not any(tmp_path.iterdir())


def test_a_directory_that_is_called_like_a_url_can_be_given_by_its_whole_path(
    tmp_path: Path,
) -> None:
    stored(tmp_path / "s3:" / "bucket" / "1", STATE)
    assert fp.steps(tmp_path / "s3:" / "bucket") == [1]


def test_without_a_home_directory_a_tilde_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "~")
    with pytest.raises(ValueError, match="set HOME"):
        fp.steps("~/run")


# Steps that Orbax named.


def by_orbax(directory: Path, steps: range, **options: Any) -> None:
    options = {"max_to_keep": None} | options
    with v0.CheckpointManager(directory, options=v0.CheckpointManagerOptions(**options)) as manager:
        for step in steps:
            manager.save(step, args=v0.args.StandardSave({"w": jnp.full(3, step)}))


@pytest.mark.parametrize(
    "options",
    [
        {"step_prefix": "ckpt"},
        {"step_format_fixed_length": 8},
        {"step_prefix": "a_b", "step_format_fixed_length": 4},
    ],
    ids=["prefix", "fixed length", "both"],
)
def test_steps_that_orbax_named_are_steps(tmp_path: Path, options: Any) -> None:
    by_orbax(tmp_path, range(18, 21), **options)
    assert fp.steps(tmp_path) == [18, 19, 20]
    newest = fp.latest(tmp_path)
    assert newest is not None
    assert newest.parent == tmp_path
    assert fp.metadata(newest).leaves["w"].shape == (3,)
    target = {"w": jnp.zeros(3, int)}
    with checkpointing(tmp_path, every_n_train_steps=1, every_n_epochs=None, keep_last=2) as ckpt:
        np.testing.assert_array_equal(ckpt.restore(target)["w"], [20] * 3)
        assert ckpt.callback.last_model_path == str(newest)
        ckpt.step(target)
    assert fp.steps(tmp_path) == [20, 21]
    with checkpointing(tmp_path) as ckpt:
        ckpt.restore(target, which=20, discard_later=True)
    assert fp.steps(tmp_path) == [20]


def test_what_this_package_saved_under_such_a_name_is_no_step(tmp_path: Path) -> None:
    for name in ("exp_1", "007", "3"):
        stored(tmp_path / name, STATE)
    assert fp.steps(tmp_path) == [3]


def test_of_two_checkpoints_of_one_step_that_which_is_called_by_it_counts(tmp_path: Path) -> None:
    by_orbax(tmp_path, range(5, 6), step_prefix="ckpt")
    stored(tmp_path / "5", STATE)
    assert fp.steps(tmp_path) == [5]
    assert fp.latest(tmp_path) == tmp_path / "5"
