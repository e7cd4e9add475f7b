"""How what a run recorded becomes lanes, bars and a Chrome trace. Pure."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

import flax_partial as fp
from flax_partial.cli.commands.timeline import layout as lanes
from flax_partial.cli.commands.timeline.chrome_trace import trace_of
from flax_partial.runs import timeline
from flax_partial.runs.timeline import End, Hold, ProcessTimeline, Run, Save, Step

if TYPE_CHECKING:
    from pathlib import Path

IN_ORDER = fp.SaveTimes(*(100.0 + i for i in range(9)))


def save(group: str, where: str = "", *, at: float = 100.0, step: int = 4) -> Save:
    times = fp.SaveTimes(*(at + i for i in range(9)))
    return Save(step, group, where, 8, times)


def names(times: fp.SaveTimes) -> list[tuple[str, float]]:
    return [(one.name, one.ended_at - one.began_at) for one in lanes.phases(times)]


def test_phases_follow_each_other_without_gaps() -> None:
    found = lanes.phases(dataclasses.replace(IN_ORDER, begun_at=105.0, ready_at=104.0))
    assert [one.name for one in found] == list(lanes.PHASES)
    ends = [found[0].began_at, *(one.ended_at for one in found)]
    assert ends == [100.0 + i for i in range(9)]


def test_waiting_for_a_writer_counts_from_when_it_is_computed() -> None:
    late = dataclasses.replace(IN_ORDER, begun_at=103.5, ready_at=105.0)
    assert (lanes.COMPUTES, 2.0) in names(late)
    assert lanes.QUEUES not in dict(names(late))
    early = dataclasses.replace(IN_ORDER, begun_at=105.5, ready_at=103.0)
    assert (lanes.QUEUES, 2.5) in names(early)
    assert lanes.COMPUTES not in dict(names(early))


@pytest.mark.parametrize(
    ("spans", "rows"),
    [
        ([], []),
        ([(0, 1), (1, 2)], [0, 0]),
        ([(0, 3), (1, 2), (2, 4), (3, 5)], [0, 1, 1, 0]),
        ([(0, 9), (1, 9), (2, 9)], [0, 1, 2]),
    ],
)
def test_spans_that_overlap_get_rows_of_their_own(spans: Any, rows: list[int]) -> None:
    assert lanes.rows_of(spans) == rows


def test_stages_are_lanes_in_the_order_of_their_devices() -> None:
    saves = [save("d", "cpu:10"), save("c"), save("b", "cpu:9", at=50), save("a", "cpu:9", at=60)]
    found = lanes.lanes_of(saves, name="")
    assert [lane.title for lane in found] == ["cpu:9", "cpu:10", "host"]
    assert [one.group for one in found[0].saves] == ["b", "a"]


def test_a_process_of_one_stage_is_one_lane() -> None:
    (lane,) = lanes.lanes_of([save("b", "cpu:2", at=60), save("a")], name="process 2")
    assert lane.title == "process 2"
    assert [one.group for one in lane.saves] == ["b", "a"]
    found = lanes.lanes_of([save("b", "cpu:2"), save("a", "cpu:3")], name="process 2")
    assert [lane.title for lane in found] == ["process 2 cpu:2", "process 2 cpu:3"]


def run_of(*processes: ProcessTimeline) -> Run:
    return Run("r", {one.process: one for one in processes})


def process(index: int = 0) -> ProcessTimeline:
    return ProcessTimeline(
        index,
        steps=[Step(3, 80, 90), Step(4, 90, 103), Step(5, 103, 120), Step(6, 120, 130)],
        holds=[
            Hold(4, "stream", 100, 102),
            Hold(4, "on_train_end", 111, 112),
            Hold(3, "x", 99, 101),
        ],
        brief_secs={4: 0.5},
        saves=[save("b", "cpu:1", at=100 + index), save("a", "cpu:1", at=99), save("z", step=3)],
        ends=[End(4, timeline.FINALIZED, 109, 111.5)],
    )


def test_chart_shows_one_checkpoint_from_its_step_to_its_end() -> None:
    chart = lanes.chart_of(run_of(process()), 4)
    assert (chart.began_at, chart.ended_at) == (90, 111.5)
    assert chart.blocked_secs == 3.5
    (track,) = chart.tracks
    assert [step.number for step in track.steps] == [4, 5]
    assert [hold.hook for hold in track.holds] == ["stream", "on_train_end"]
    assert [one.group for lane in track.lanes for one in lane.saves] == ["a", "b"]


def test_chart_has_a_track_for_each_process() -> None:
    chart = lanes.chart_of(run_of(process(1), process(0)), 4)
    assert [track.lanes[0].title for track in chart.tracks] == ["process 0", "process 1"]


def test_trace_has_complete_events_within_each_other_on_named_threads() -> None:
    trace = trace_of([run_of(process(0), process(1))])
    by_kind = defaultdict(list)
    for event in trace["traceEvents"]:
        by_kind[event["ph"]].append(event)
    assert by_kind.keys() == {"M", "X"}
    named = {(e["pid"], e["tid"]) for e in by_kind["M"] if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in by_kind["X"]} == named
    titles = [e["args"]["name"] for e in by_kind["M"] if e["name"] == "process_name"]
    assert titles == ["process 0", "process 1"]
    threads = defaultdict(list)
    for event in by_kind["X"]:
        assert event["ts"] >= 0
        threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in threads.values():
        for one in spans:
            for other in spans:
                apart = one[1] <= other[0] or other[1] <= one[0]
                within = (one[0] <= other[0] and other[1] <= one[1]) or (
                    other[0] <= one[0] and one[1] <= other[1]
                )
                assert apart or within, (one, other)


def test_trace_says_what_and_when_in_microseconds() -> None:
    (event,) = [e for e in trace_of([run_of(process())])["traceEvents"] if e["name"] == "b"]
    expected = {"ts": 20_000_000, "dur": 8_000_000, "args": {"checkpoint": 4, "bytes": 8}}
    assert {name: event[name] for name in expected} == expected


HEADER = timeline.encode("run", run="one", process=0, processes=1)
SAVE = timeline.encode_save(save("a"))


def read(directory: Path, text: str) -> list[Run]:
    (directory / "timeline").mkdir(exist_ok=True)
    (directory / "timeline" / "p0.jsonl").write_text(text)
    return timeline.read(directory)


@pytest.mark.parametrize(
    "torn",
    [
        SAVE[:-20],
        SAVE.replace("[100.0", "[NaN"),
        SAVE.replace("100.0,", ""),
        '{"is":"save"}\n',
        '{"is":"a kind of some later version"}\n',
        "[]\n",
        "7\n",
        "\x00\x00\ufffd\n",
        "\n",
    ],
)
def test_what_is_no_record_is_left_out(tmp_path: Path, torn: str) -> None:
    (run,) = read(tmp_path, HEADER + torn + "\n" + SAVE + torn)
    assert run.processes[0].saves == [save("a")]


def test_a_run_that_goes_on_is_another_one(tmp_path: Path) -> None:
    later = timeline.encode("run", run="two", process=0, processes=1)
    text = HEADER + SAVE + SAVE[:30] + "\n" + later + timeline.encode_save(save("b", at=200))
    one, two = read(tmp_path, text)
    assert [one.name, two.name] == ["one", "two"]
    assert [s.group for s in two.processes[0].saves] == ["b"]


def test_nothing_recorded_is_no_run(tmp_path: Path) -> None:
    assert timeline.read(tmp_path) == []
    assert read(tmp_path, "") == read(tmp_path, HEADER) == []
