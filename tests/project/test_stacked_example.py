"""The scanned example: what it saves layer by layer, it goes on from to the same bits."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import jax
import pipeline_lm
import pytest
import scanned_layers
from example_process import digests

import flax_partial as fp

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]

SMALL = ("--layers", "4", "--width", "32", "--steps-per-epoch", "2")


@pytest.fixture(autouse=True)
def _as_a_user_runs_it() -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_stops_and_goes_on_to_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> str:
        command = ["--directory", str(tmp_path / "run"), "--no-measure", "--epochs", "2", *SMALL]
        assert scanned_layers.main(command) == 0
        return capsys.readouterr().out

    whole = run()
    shutil.rmtree(tmp_path / "run" / "4")
    again = run()
    assert "Resumed at step 2, in epoch 2 with 0 of 2 batches done." in again
    assert len(digests(whole)) == 2
    assert digests(again) == digests(whole)
    leaves = fp.metadata(tmp_path / "run" / "4").leaves
    kernel = leaves["params.blocks.qkv.kernel"]
    assert kernel.shape == (4, 32, 96)
    assert kernel.sharding is not None
    assert kernel.sharding["partition_spec"] == ["stage"]


def test_prints_what_saving_takes_of_the_host_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = dict(list(scanned_layers.MEASURED.items())[:2])  # the third is alike
    monkeypatch.setattr(scanned_layers, "MEASURED", ways)
    scanned_layers.compare(scanned_layers.make_parser().parse_args(SMALL))
    row = r"^  ([a-z ]+\w) +-?\d+ MB(?:, +-?\d+ MB of it for saving)?$"
    assert re.findall(row, capsys.readouterr().out, re.MULTILINE) == list(ways.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stages", "3"), "argument --stages: the 4 layers cannot be spread evenly"),
        (("--stages", "16"), "argument --stages: 16 are more than the 8 devices"),
        (("--width", "33"), "argument --width: 33 is not a multiple of 32"),
        (("--steps-per-epoch", "9999"), "argument --steps-per-epoch: 9999 batches are more"),
        (("--max-inflight-mb", "0"), "argument --max-inflight-mb: '0' is not a whole number"),
        (("--measure", "all"), "argument --measure: invalid choice"),
        (("--directory", __file__), "is a file, or below one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_options_are_refused_with_status_2(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        scanned_layers.main([*SMALL, *options])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_options_of_the_other_example_mean_the_same() -> None:
    def names(parser: argparse.ArgumentParser) -> set[str]:
        return {name for action in parser._actions for name in action.option_strings}  # noqa: SLF001

    assert names(pipeline_lm.make_parser()) < names(scanned_layers.make_parser())
