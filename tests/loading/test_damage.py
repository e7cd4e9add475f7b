"""A flipped bit: what is loaded is right, or the error names the leaf; and verify reports it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import damage
import numpy as np
import pytest
import trees
from things import stored

import flax_partial as fp
from flax_partial.loading import load as load_module

if TYPE_CHECKING:
    from pathlib import Path

STATE = {
    "tiny": np.arange(10),  # stands in the table of contents
    "middle": np.arange(5000),
    "large": np.arange(300_000, dtype=np.float32),
    "packed": {"text": "ä", "number": 2.5},
    "compressed": np.arange(2000),  # is found through the database
}
# Nothing reads them once a checkpoint is finalized, or they hold nothing.
IDLE = ("commit_success.txt", "orbax.checkpoint")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "c"
    for name, value in STATE.items():
        compression = "zstd" if name == "compressed" else None
        options = fp.SaveOptions(chunk_bytes=100_000, compression=compression)
        fp.save(path, {name: value}, options=options)
    fp.finalize(path)
    assert fp.verify(path).ok
    return path


def files_of(path: Path) -> list[str]:
    return sorted(
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.is_file() and file.name not in IDLE
    )


def positions(size: int) -> list[int]:
    """Bytes spread over a file: both ends, and some between."""
    return sorted({0, size - 1, *(size * step // 12 for step in range(12))})


def damaged(path: Path, name: str, position: int) -> bytes:
    """Flips one bit; returns the file as it was."""
    data = (path / name).read_bytes()
    changed = bytearray(data)
    changed[position] ^= 1 << position % 8
    (path / name).write_bytes(changed)
    return data


def test_flipped_bit_is_never_loaded_as_data(original: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    shutil.copytree(original, path)
    noticed, silent = set(), []
    for name in files_of(path):
        is_reported = []
        for position in positions((path / name).stat().st_size):
            data = damaged(path, name, position)
            try:
                trees.assert_same(fp.load(path), STATE)
            except fp.CorruptCheckpointError as error:
                noticed.add(name)
                said = str(error)
                assert "contents.json" in said or any(f"'{leaf}" in said for leaf in STATE), said
            report = fp.verify(path)
            assert all(report.bad.values())
            is_reported.append(not report.ok)
            (path / name).write_bytes(data)
        if name.endswith(".json") or "/" not in name or name.count("/") == 1:
            assert all(is_reported), name
        elif not any(is_reported):
            silent.append(name)
    assert "state/contents.json" in noticed
    assert "state/manifest.ocdbt" in noticed
    assert any(name.startswith("state/d/") for name in noticed)
    assert any(name.startswith("state/part.") for name in noticed)
    # A part's own index is not read any more: the root database refers to its data.
    assert all(name.startswith("state/part.") for name in silent), silent
    assert fp.verify(path).ok


@pytest.mark.parametrize("how", ["removed", "emptied", "cut short", "replaced"])
def test_lost_data_is_named_and_the_rest_can_be_read(
    original: Path, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "c"
    shutil.copytree(original, path)
    (victim,) = (
        file for file in path.glob("state/part.*/data") if 40_000 <= file.stat().st_size < 100_000
    )
    match how:
        case "removed":
            victim.unlink()
        case "emptied":
            victim.write_bytes(b"")
        case "cut short":
            victim.write_bytes(victim.read_bytes()[:20_000])
        case "replaced":
            victim.write_bytes(bytes(victim.stat().st_size))
    with pytest.raises(fp.CorruptCheckpointError, match=r"c is damaged.*\n.*'middle'") as caught:
        fp.load(path)
    assert "'large'" not in str(caught.value)
    report = fp.verify(path)
    assert "middle" in report.bad
    assert not {"large", "tiny", "packed.text"} & set(report.bad)
    wanted = {"large": np.zeros_like(STATE["large"]), "tiny": np.zeros_like(STATE["tiny"])}
    loaded = fp.load(path, wanted, partial=True)
    trees.assert_same(loaded, {name: STATE[name] for name in wanted})


DAMAGED_TABLES = {
    "empty": lambda _: b"",
    "cut": lambda data: data[:-5],
    "no JSON": lambda _: b"\0\1\2",
    "other JSON": lambda _: b'{"a": 1}\n',
    "zeros": lambda data: bytes(len(data)),
    "one bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
}


@pytest.mark.parametrize("case", DAMAGED_TABLES)
def test_damaged_part_is_refused_and_no_older_value_comes_back(tmp_path: Path, case: str) -> None:
    """A table appears whole or not at all: one that is damaged was committed."""
    fp.save(tmp_path / "c", {"a": np.arange(3), "b": "old"})
    report = fp.save(tmp_path / "c", {"b": "new"}, replace=True)
    directory = tmp_path / "c.partial_save" / "state" / report.part
    data = (directory / "part.json").read_bytes()
    (directory / "part.json").write_bytes(DAMAGED_TABLES[case](data))
    found = fp.status(tmp_path / "c")
    assert (found.leaves, found.torn, found.damaged) == (("a", "b"), (), (report.part,))
    with pytest.raises(fp.CorruptCheckpointError, match=report.part):
        fp.finalize(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    (directory / "part.json").write_bytes(data)
    fp.finalize(tmp_path / "c")
    assert fp.load(tmp_path / "c")["b"] == "new"
    assert fp.verify(tmp_path / "c").ok


def test_damaged_part_that_is_moved_away_and_saved_again_is_mended(tmp_path: Path) -> None:
    fp.save(tmp_path / "c", {"a": 1})
    report = fp.save(tmp_path / "c", {"b": 2})
    directory = tmp_path / "c.partial_save" / "state" / report.part
    (directory / "part.json").write_bytes(b"damaged")
    directory.rename(tmp_path / "away")
    fp.save(tmp_path / "c", {"b": 2}, replace=True)
    fp.finalize(tmp_path / "c")
    trees.assert_same(fp.load(tmp_path / "c"), {"a": 1, "b": 2})


def test_table_of_another_part_is_refused(tmp_path: Path) -> None:
    """Where two tables are exchanged an older value would count as the newer."""
    reports = [fp.save(tmp_path / "c", {"a": value}, replace=True) for value in (1, 2)]
    one, two = (
        tmp_path / "c.partial_save" / "state" / report.part / "part.json" for report in reports
    )
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    with pytest.raises(fp.CorruptCheckpointError, match="another part"):
        fp.finalize(tmp_path / "c")


def test_part_without_a_table_was_never_saved(tmp_path: Path) -> None:
    fp.save(tmp_path / "c", {"a": np.arange(3)})
    report = fp.save(tmp_path / "c", {"b": np.arange(3)})
    (tmp_path / "c.partial_save" / "state" / report.part / "part.json").unlink()
    found = fp.status(tmp_path / "c")
    assert (found.leaves, found.torn, found.damaged) == (("a",), (report.part,), ())
    fp.finalize(tmp_path / "c")
    assert set(fp.load(tmp_path / "c")) == {"a"}
    assert fp.verify(tmp_path / "c").ok


def test_data_lost_before_finalize_is_told_by_finalize(tmp_path: Path) -> None:
    """The part was committed: that its data is gone must not go unnoticed."""
    report = fp.save(tmp_path / "c", {"a": np.arange(3), "b": np.arange(300_000)})
    (tmp_path / "c.partial_save" / "state" / report.part / "data").unlink()
    with pytest.raises(fp.CorruptCheckpointError, match=report.part):
        fp.finalize(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_contents_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    """Text stands in them alone: no digest of an array would tell."""
    for name in ("one", "two"):
        stored(tmp_path / name, {"text": name, "same": np.arange(3)})
    one, two = (tmp_path / name / "state" / "contents.json" for name in ("one", "two"))
    one.write_bytes(two.read_bytes())
    for call in (fp.load, fp.metadata):
        with pytest.raises(fp.CorruptCheckpointError, match=r"contents\.json"):
            call(tmp_path / "one")
    assert not fp.verify(tmp_path / "one").ok


def test_any_damage_is_told_or_does_not_matter(tmp_path: Path) -> None:
    """A few trials of `damage.py`, which says what holds; a script for many more."""
    trials = damage.Trials(tmp_path)
    faults = {seed: found for seed in range(60) if (found := trials.run(seed)[1])}
    trials.close()
    assert not faults


def test_reading_ahead_gives_what_is_there_and_names_all_that_is_damaged(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there is an accelerator: fed a piece while the next one is read."""
    monkeypatch.setattr(load_module.placing, "has_accelerator", lambda: True)
    monkeypatch.setattr(load_module, "_PIECE_BYTES", 10_000)
    path = tmp_path / "c"
    shutil.copytree(original, path)
    trees.assert_whole(path, STATE)
    seen: list[tuple[int, int]] = []
    fp.load(path, progress=lambda *amounts: seen.append(amounts))
    assert len(seen) > 3
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == fp.metadata(path).bytes
    for name in ("middle", "large"):
        (file,) = [
            file
            for file in path.glob("state/part.*/data")
            if file.stat().st_size in range(STATE[name].nbytes, STATE[name].nbytes + 9000)
        ]
        damaged(path, str(file.relative_to(path)), STATE[name].nbytes // 2)
    with pytest.raises(fp.CorruptCheckpointError, match=r"(?s)'middle'.*'large'|'large'.*'middle'"):
        fp.load(path)
