"""The benchmark says not met where a target is missed, and compares what it ran side by side."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

# At the end, so that flax_partial stays the installed one.
sys.path.append(str(Path(__file__).parents[2]))
harness: Any = importlib.import_module("benchmarks.harness")
report: Any = importlib.import_module("benchmarks.report")
pages: Any = importlib.import_module("benchmarks.pages")
runs: Any = importlib.import_module("benchmarks.__main__")

OURS = harness.Figure("ours")
PEER = harness.Figure("peer")

FASTER = harness.Target.faster("ours", than="peer", at_least=5)
WITHIN = harness.Target.within(OURS, of=PEER, at_most=1.2)
BELOW = harness.Target.below(OURS, 50, "ms", unit=1e-3)
LINEAR = harness.Target.linear(OURS, PEER)
KEEPS = harness.Target.keeps("total", "ours", of="peer", at_least=0.95)


def outcome_of(
    target: Any, ours: tuple[float, ...], peer: tuple[float, ...], *, is_small: bool = False
) -> Any:
    scenario = harness.Scenario("trial", "some work", contenders=(), targets=(target,))
    rounds = {"ours": [{"total": secs} for secs in ours], "peer": [{"total": s} for s in peer]}
    return harness.Outcome(scenario, is_small=is_small, rounds=rounds)


@pytest.mark.parametrize(
    ("target", "ours", "peer", "is_met"),
    [
        pytest.param(FASTER, 1.0, 5.0, True, id="five times as fast"),
        pytest.param(FASTER, 1.0, 4.9, False, id="not quite five times as fast"),
        pytest.param(WITHIN, 1.2, 1.0, True, id="within the bound"),
        pytest.param(WITHIN, 1.21, 1.0, False, id="past the bound"),
        pytest.param(BELOW, 0.05, 1.0, True, id="as many units"),
        pytest.param(BELOW, 0.051, 1.0, False, id="more units"),
        pytest.param(LINEAR, 0.5, 1.0, True, id="linear"),
        pytest.param(LINEAR, 0.39, 1.0, False, id="half the work takes too little"),
        pytest.param(LINEAR, 0.61, 1.0, False, id="half the work takes too much"),
        pytest.param(KEEPS, 0.95, 1.0, True, id="keeps the rate"),
        pytest.param(KEEPS, 0.94, 1.0, False, id="loses more of the rate"),
    ],
)
def test_a_target_is_met_up_to_its_bound_and_not_past_it(
    target: Any, ours: float, peer: float, *, is_met: bool
) -> None:
    assert outcome_of(target, (ours,), (peer,)).is_met(target) is is_met


def test_the_medians_decide_whatever_one_round_was_like() -> None:
    assert outcome_of(FASTER, (1.0, 1.0, 90.0), (0.1, 5.0, 5.0)).is_met(FASTER) is True


@pytest.mark.parametrize(("ours", "peer"), [((), (1.0,)), ((1.0,), ()), ((), ())])
def test_what_was_not_measured_is_not_met(ours: tuple[float, ...], peer: tuple[float, ...]) -> None:
    assert outcome_of(FASTER, ours, peer).is_met(FASTER) is None


def test_small_work_meets_no_target() -> None:
    assert outcome_of(FASTER, (1.0,), (9.0,), is_small=True).is_met(FASTER) is None


@pytest.mark.parametrize(("peer", "verdict"), [(9.0, " met "), (3.0, " not met ")])
def test_the_table_says_whether_a_target_is_met(peer: float, verdict: str) -> None:
    printed = StringIO()
    result = report.as_result(outcome_of(FASTER, (1.0,), (peer,)))
    report.print_result(result, Console(file=printed, width=120))
    (line,) = [line for line in printed.getvalue().splitlines() if "faster than" in line]
    assert verdict in line
    assert ("not met" in line) is (verdict == " not met ")


def test_contenders_take_turns_in_rotated_order_and_use_what_was_prepared(tmp_path: Path) -> None:
    turns: list[str] = []

    def build(*, small: bool) -> Any:
        shared: list[Path] = []

        def run(name: str, path: Path) -> dict[str, float]:
            assert (shared[0] / "data").read_text() == "prepared"
            path.mkdir()  # fails if the turn before left anything
            turns.append("warm-up" if small else name)
            return {"total": 1.0}

        def prepare(directory: Path) -> None:
            shared.append(directory)
            (directory / "data").write_text("prepared")

        contenders = [
            harness.Contender(name, partial(run, name), max_rounds=limit)
            for name, limit in (("a", None), ("b", 1), ("c", None))
        ]
        return harness.Scenario("trial", "", tuple(contenders), (), prepare=prepare)

    outcome = harness.run_scenario(
        build, small=False, rounds=3, directory=tmp_path, say=lambda _: None
    )
    assert turns[3:] == [*"abc", *"ca", *"ca"]  # after the warm-up; b takes part once
    assert [len(outcome.rounds[name]) for name in "abc"] == [3, 1, 3]
    assert not list(tmp_path.iterdir())


def test_what_there_is_no_time_for_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each scenario has its share of what is left; a turn has to fit by what its last one took."""
    now, said = [0.0], StringIO()
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(harness, "time", clock)
    monkeypatch.setattr(runs, "time", clock)
    monkeypatch.setattr(runs.plots, "draw", lambda *_: [])

    def build(name: str, secs: float, *, small: bool) -> Any:  # noqa: ARG001
        def run(path: Path) -> dict[str, float]:
            path.mkdir()
            now[0] += secs
            return {"total": secs}

        return harness.Scenario(name, "", (harness.Contender(f"of {name}", run),), ())

    results = runs.run_all(
        [partial(build, name, secs) for name, secs in (("one", 4), ("two", 13), ("three", 1))],
        SimpleNamespace(small=True, rounds=3, directory=tmp_path / "s", json=tmp_path / "json"),
        Console(file=said, width=200),
        {},
        shares=[2, 1, 1],
        ends_at=20,
    )
    assert [len(one["contenders"][f"of {one['name']}"]["rounds"]) for one in results] == [2, 1]
    assert "Turns for which there was no time: of one: 1." in said.getvalue()
    assert "Left out, for there was no time: three." in said.getvalue()


PAGES = ("README.md", "docs/index.md", "docs/performance.md")
CONTENDERS = {  # of each scenario that the pages name: how long it takes, in s
    "many_small": {"flax_partial": 0.1, "Orbax v1.partial": 2.0},
    "stream": {
        "flax_partial": 0.5,
        "Orbax v1.partial": 3.0,
        "Orbax v1, one whole save": 1.5,
        "safetensors + fsync": 0.75,
        "plain write + fsync": 0.7,
    },
    "load": {
        "flax_partial, large arrays": 0.25,
        "Orbax v1 of ours, large arrays": 0.75,
        "Orbax v1 of its own, large arrays": 1.25,
        "plain read, large arrays": 0.3,
    },
    "train_loop": {"flax_partial": 0.04, "Orbax v1, async": 0.8, "no checkpoints": 0.01},
    "reuse": {"flax_partial": 0.4, "flax_partial, reuse": 0.2},
    "compression": {"plain, float32": 0.3, "blosc, float32": 0.5},
    "memory": {"flax_partial": 9e7, "Orbax v1.partial": 1e8, "Orbax v1, one whole save": 3e9},
}


def run_of(*scenarios: str, **machine: Any) -> dict[str, Any]:
    """What a run of scenarios leaves, as `report.write_json` wrote it."""
    metrics = ("total", "save", "finalize", "blocked", "steps/s", "memory")
    results = []
    for name in scenarios:
        rounds = {
            contender: [dict.fromkeys(metrics, value)]
            for contender, value in CONTENDERS[name].items()
        }
        target = harness.Target.below(harness.Figure("flax_partial"), 9, "s")
        scenario = harness.Scenario(name, "some work", contenders=(), targets=(target,))
        outcome = harness.Outcome(scenario, is_small=False, rounds=rounds)
        results.append(report.as_result(outcome))
    return {"machine": report.describe_machine(Path()) | machine, "scenarios": results}


def copied_pages(root: Path) -> Path:
    (root / "docs").mkdir()
    for page in PAGES:
        shutil.copy(Path(__file__).parents[2] / page, root / page)
    return root


def texts_of(root: Path) -> dict[str, str]:
    return {page: (root / page).read_text() for page in PAGES}


def test_all_figures_of_the_pages_are_made_from_one_run(tmp_path: Path) -> None:
    root = copied_pages(tmp_path)
    written = pages.write([run_of(*CONTENDERS, commit="c0ffee")], root)
    assert {path.relative_to(root).as_posix() for path in written} >= {*PAGES}
    texts = texts_of(root)
    for text in texts.values():
        assert "(commit c0ffee), 20" in text
    assert "**20 &times;**" in texts["docs/index.md"]
    assert "**6 &times;**" in texts["docs/index.md"]
    assert "**5 &times;**" in texts["docs/index.md"]
    assert "| 2 s + 2 s | 100 ms + 100 ms |" in texts["README.md"]
    assert "| `stream` | flax_partial: total, in s" not in texts["README.md"]
    assert "| flax_partial, reuse | 1 | 200 ms | 200 ms |" in texts["docs/performance.md"]
    assert "| blosc, float32 | 1 | 500 ms | 500 ms |" in texts["docs/performance.md"]
    again = pages.write([run_of(*CONTENDERS, commit="c0ffee")], root)
    assert (again, texts_of(root)) == (written, texts)


def test_figures_of_several_runs_say_which_is_of_which(tmp_path: Path) -> None:
    root = copied_pages(tmp_path)
    first, *others = CONTENDERS
    pages.write([run_of(*CONTENDERS, commit="old"), run_of(first, commit="new")], root)
    text = texts_of(root)["docs/performance.md"]
    assert f"`{first}`: Version" in text
    assert ", ".join(f"`{name}`" for name in others) + ": Version" in text


def test_what_was_not_measured_leaves_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied_pages(tmp_path)
    before = texts_of(root)
    pages.write([run_of("stream")], root)
    after = texts_of(root)
    assert [page for page in PAGES if before[page] != after[page]] == ["docs/performance.md"]
    assert "README.md: 'beside Orbax' needs many_small" in capsys.readouterr().err


def test_accelerators_have_a_table_of_their_own(tmp_path: Path) -> None:
    root = copied_pages(tmp_path)
    pages.write([run_of("load", device="Device 7")], root)
    head, table = texts_of(root)["docs/performance.md"].split("<!-- figures: accelerators -->")
    assert "Device 7" not in head
    assert "Device 7, " in table.split("<!-- end of figures -->")[0]


@pytest.mark.parametrize("copies", [0, 2])
def test_a_block_that_is_not_there_once_is_an_error(copies: int) -> None:
    block = "<!-- figures: targets -->\n\nold\n\n<!-- end of figures -->\n"
    with pytest.raises(ValueError, match=f"{copies} blocks are called 'targets'"):
        pages.replaced(copies * block, "targets", "new")


@pytest.mark.timeout(900)  # of which it takes half a minute, where nothing else runs
def test_what_accelerators_are_measured_by_runs_on_cpu_devices(tmp_path: Path) -> None:
    """All of it, with a fraction of the work: each contender measured, each target printed."""
    (tmp_path / "benchmarks").symlink_to(Path(__file__).parents[2] / "benchmarks")
    options = ("--allow-cpu", "--small", "--rounds", "1", "--minutes", "99")
    (tmp_path / "scratch").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            *options,
            "--directory",
            "scratch",
            "--json",
            "gpu.json",
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        },
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["devices"] == 2
    names = [scenario["name"] for scenario in found["scenarios"]]
    assert names == ["training", "writers", "small", "every_step", "storage", "load"]
    for scenario in found["scenarios"]:
        assert all(contender["rounds"] for contender in scenario["contenders"].values())
        for target in scenario["targets"]:
            assert target["ratio"] is not None, target["text"]
    assert not list((tmp_path / "scratch").iterdir())
