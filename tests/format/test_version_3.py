"""What version 3 of the format can say and saves do not yet: parts that are written by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import second_reader

import flax_partial as fp
from flax_partial.distributed import agreement
from flax_partial.format.merge import merge
from flax_partial.format.model import BYTES, DICT, LIST, STRING, Leaf, Part, part_path
from flax_partial.format.tables import encode_part

if TYPE_CHECKING:
    from pathlib import Path


def part(number: int, *leaves: Leaf, process: int = 0, metadata: Any = None) -> Part:
    return Part(process, 100 + number, metadata or {}, leaves, 0)


def write(session: Path, *parts: Part, processes: int = 1) -> None:
    for one in parts:
        name = f"part.{one.time_ns:019d}.p{one.process}.{one.time_ns:x}"
        folder = session / "state" / part_path(name, process=one.process, processes=processes)
        folder.mkdir(parents=True)
        (folder / "part.json").write_bytes(encode_part(one))


def text(value: str, *keys: str, kinds: str = "") -> Leaf:
    return Leaf(keys, kinds or "d" * len(keys), STRING, text=value)


def held_open(*keys: str, kind: str = DICT, kinds: str = "", generation: int = 0) -> Leaf:
    key_kinds = kinds or "d" * len(keys)
    return Leaf(keys, key_kinds, kind, generation=generation, placeholder=True)


VALUES = {"b": b"\x00\xffraw", "large": bytes(range(256)) * 700, "none": b""}


def test_bytes_are_loaded_and_orbax_reads_them_as_an_array(tmp_path: Path) -> None:
    leaves = [Leaf((name,), "d", BYTES, data=value) for name, value in VALUES.items()]
    write(tmp_path / "c.partial_save", part(0, *leaves))
    fp.finalize(tmp_path / "c")
    assert fp.load(tmp_path / "c") == VALUES
    target = {"b": b"", "large": np.bytes_(b""), "none": b""}
    loaded = fp.load(tmp_path / "c", target)
    assert loaded == VALUES
    assert type(loaded["large"]) is np.bytes_
    assert fp.verify(tmp_path / "c").ok
    assert second_reader.read_checkpoint(tmp_path / "c") == VALUES
    found = ocp.load(tmp_path / "c")
    assert {name: bytes(value) for name, value in found.items()} == VALUES
    with pytest.raises(fp.TargetMismatchError, match="'b' is bytes"):
        fp.load(tmp_path / "c", {"b": "text"}, partial=True)


PIECES: dict[str, tuple[list[Part], Any]] = {
    "filled by another part": (
        [part(0, held_open("a"), text("x", "b")), part(1, text("y", "a", "k"))],
        {"a": {"k": "y"}, "b": "x"},
    ),
    "filled by an earlier part": (
        [part(0, text("y", "a", "k")), part(1, held_open("a"), text("x", "b"))],
        {"a": {"k": "y"}, "b": "x"},
    ),
    "an element each": (
        [
            part(0, text("x", "0", kinds="s"), held_open("1", kinds="s")),
            part(1, held_open("0", kinds="s"), text("y", "1", kinds="s")),
        ],
        ["x", "y"],
    ),
    "a later generation of it": (
        [part(0, text("x", "a")), part(1, held_open("a", generation=3))],
        {"a": "x"},
    ),
    "another type of container": (
        [part(0, held_open("a", kind=LIST)), part(1, text("y", "a", "k"))],
        {"a": {"k": "y"}},
    ),
    "never filled": ([part(0, held_open("a"), text("x", "b"))], {"a": {}, "b": "x"}),
    "held open twice": ([part(0, held_open("a")), part(1, held_open("a"))], {"a": {}}),
    "the root": ([part(0, held_open()), part(1, text("x", "a"))], {"a": "x"}),
}


@pytest.mark.parametrize("name", PIECES)
def test_placeholder_gives_way_to_what_others_hold(name: str, tmp_path: Path) -> None:
    parts, expected = PIECES[name]
    write(tmp_path / "c.partial_save", *parts)
    fp.finalize(tmp_path / "c")
    assert fp.load(tmp_path / "c") == expected
    assert fp.verify(tmp_path / "c").ok
    found = second_reader.read_checkpoint(tmp_path / "c")
    assert found.keys() == fp.metadata(tmp_path / "c").leaves.keys()


def test_empty_container_of_its_own_gives_way_to_nothing() -> None:
    real = Leaf(("a",), "d", DICT)
    plan = merge({"part.0": part(0, real), "part.1": part(1, text("y", "a", "k"))})
    assert "'a' is a leaf" in plan.conflicts[0]
    assert merge({"part.0": part(0, real), "part.1": part(1, held_open("a"))}).leaves == (real,)


def test_parts_of_many_processes_lie_in_directories_of_their_own(tmp_path: Path) -> None:
    parts = [part(n, text("x", f"k{n}"), process=n) for n in (0, 999, 1000, 2500)]
    write(tmp_path / "c.partial_save", *parts, part(5, text("here", "h")), processes=4000)
    write(tmp_path / "c.partial_save", part(9, metadata={"alone": 1}))
    folders = {path.name for path in (tmp_path / "c.partial_save" / "state").glob("p*")}
    assert {"p0", "p1", "p2"} <= folders
    status = fp.status(tmp_path / "c")
    assert [one.name.split("/")[0][:2] for one in status.parts] == [
        "p0",
        "p0",
        "pa",
        "p0",
        "p1",
        "p2",
    ]
    fp.finalize(tmp_path / "c")
    assert fp.metadata(tmp_path / "c").custom_metadata == {"alone": 1}
    expected = {"k0", "k999", "k1000", "k2500", "h"}
    assert fp.load(tmp_path / "c").keys() == expected
    assert second_reader.read_checkpoint(tmp_path / "c").keys() == expected
    assert ocp.load(tmp_path / "c").keys() == expected
    assert fp.verify(tmp_path / "c").ok


def test_process_of_very_many_saves_into_a_folder_of_some_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    monkeypatch.setattr(agreement, "index", lambda: 2500)
    monkeypatch.setattr(agreement, "count", lambda: 4000)
    for number in range(2):
        report = fp.save(path, {f"{number}": np.arange(1000)})
        assert report.part.startswith("p2/part.")
    with pytest.raises(fp.KeyConflictError):
        fp.save(path, {"1": np.arange(1000)})
    monkeypatch.undo()
    fp.save(path, {"2": np.arange(1000)})
    fp.finalize(path)
    assert fp.load(path).keys() == {"0", "1", "2"}
    assert fp.verify(path).ok
    fp.save(tmp_path / "d", {"a": 1})
    (tmp_path / "d.partial_save" / "state" / "p7").mkdir()
    fp.abort(tmp_path / "d")
    assert not (tmp_path / "d.partial_save").exists()
