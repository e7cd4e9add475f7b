"""The command line on a run in an object store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors
from shell import Shell
from stores import memory

import flax_partial as fp
from flax_partial.callbacks import checkpointing
from flax_partial.cli.main import PROBLEM, WRONG_USE

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run() -> fp.StorePath:
    """Steps 2 and 4 are finalized, 5 is unfinished."""
    url = memory("/run")
    with checkpointing(url, every_n_train_steps=2, every_n_epochs=None) as ckpt:
        for step in range(1, 5):
            ckpt.step({"w": np.full(3, step)}, {"loss": 1 / step})
    fp.save(f"{url}/5", {"w": np.ones(3)}, custom_metadata={"step": 5})
    return fp.StorePath(url)


def test_ls_latest_show_and_status(run: fp.StorePath, shell: Shell) -> None:
    listed = shell.json("ls", run, "--monitor", "loss")
    assert (listed["directory"], listed["latest"], listed["best"]) == (str(run), "4", "4")
    assert [(one["name"], one["state"], one["bytes"]) for one in listed["checkpoints"]] == [
        ("2", "finalized", 24),
        ("4", "finalized", 24),
        ("5", "unfinished", 24),
    ]
    assert shell.run("latest", run) == f"{run}/4\n"
    assert shell.json("show", run)["path"] == f"{run}/4"
    assert shell.json("show", run / "5")["state"] == "unfinished"
    assert shell.json("status", run)["path"] == f"{run}/5"
    assert shell.json("timeline", run)["step"] == 4


def test_verify_finds_what_is_damaged(run: fp.StorePath, shell: Shell) -> None:
    assert shell.json("verify", run)["ok"]
    part = next(one.name for one in (run / "2" / "state").iterdir() if "part." in one.name)
    (run / "2").store.put(f"state/{part}/part.json", [b"{}"])
    assert not shell.json("verify", run, status=PROBLEM)["ok"]
    assert shell.json("verify", run / "4")["ok"]


def test_sessions_are_finalized_or_dropped(run: fp.StorePath, shell: Shell) -> None:
    fp.save(run / "6", {"w": np.ones(3)}, custom_metadata={"step": 6})
    assert shell.json("finalize", run / "5")["path"] == f"{run}/5"
    assert shell.json("abort", run / "6", "--yes")["dropped"]
    assert fp.steps(run) == [2, 4, 5]


def test_rm_and_prune_remove(run: fp.StorePath, shell: Shell) -> None:
    assert shell.json("rm", run / "2", "--yes")["bytes"] > 24
    fp.finalize(run / "5")
    assert shell.json("prune", run, "--keep-last", 1, "--yes")["removed"] == ["4"]
    assert fp.steps(run) == [5]
    assert not (run / "2").exists()


def test_export_and_import_go_both_ways(run: fp.StorePath, shell: Shell, tmp_path: Path) -> None:
    exported = run / "w.safetensors"
    assert shell.json("export", run, exported)["tensors"] == 1
    assert (load_safetensors(exported.read_bytes())["w"] == 4).all()
    shell.run("export", run, exported, status=WRONG_USE)
    shell.run("export", run / "2", tmp_path / "w.safetensors")
    shell.run("import", tmp_path / "w.safetensors", run / "base")
    shell.run("import", tmp_path / "w.safetensors", run / "base", status=WRONG_USE)
    assert (fp.load(run / "base")["w"] == 2).all()
    assert shell.json("diff", run / "2", run / "base")["same"] == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("ls {run}s", "{run}s does not exist; there is {run}"),
        ("show {run}/3", "there is no checkpoint at {run}/3; {run} has 5, 4, 2"),
        ("rm {run} --yes", "{run} is a run: its newest finalized checkpoint is {run}/4"),
        ("finalize {run}/4", "No unfinished checkpoint: {run}/4 is finalized already."),
        ("ls {run}/4", "{run}/4 is a checkpoint, not a directory of them: use show or status"),
        ("ls s3://", "does not name a place in an object store"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    run: fp.StorePath, shell: Shell, command: str, message: str
) -> None:
    assert not shell.run(*command.format(run=run).split(), status=WRONG_USE)
    assert message.format(run=run) in shell.error
    assert shell.error.count("\n") == 1
