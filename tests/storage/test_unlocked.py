"""Where locks are missing, or hold on one machine only, control files take their place."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import other_systems
import pytest
import stress
from things import QUICK, X

import flax_partial as fp
from flax_partial.storage import (
    control_objects,
    directory_store,
    files,
    locks,
    medium,
    places,
    session_dir,
    unlocked_place,
)
from flax_partial.storage.control import Listed, Verdict
from flax_partial.storage.directory_store import DirectoryStore
from flax_partial.storage.medium import Mount
from flax_partial.storage.place import OpenSession
from flax_partial.storage.unlocked_place import UnlockedPlace

KINDS = {
    **dict.fromkeys(
        ("ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "fuse.fuse-overlayfs"), True
    ),
    **dict.fromkeys(("ceph", "gfs2", "ocfs2", "fuse.rclone", "fuse.s3fs", "fuse"), True),
    **dict.fromkeys(("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "wekafs"), False),
    **dict.fromkeys(("fuse.sshfs", "fuse.glusterfs", "fuse.juicefs", "fuse.JuiceFS"), False),
}
BUCKETS = {"fuse.rclone", "fuse.s3fs"}


def mounted(patch: pytest.MonkeyPatch, kind: str) -> None:
    """Has everything lie on a file system of that type."""
    mount = Mount(kind, "server:/export", "/scratch", frozenset(("rw",)))
    patch.setattr(medium, "mount_of", lambda _: mount)
    patch.setattr(medium, "_said", set())


@pytest.fixture
def unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(locks.VARIABLE, "files")


@pytest.mark.parametrize("kind", KINDS)
def test_type_of_the_file_system_decides(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(locks.VARIABLE, raising=False)
    mounted(monkeypatch, kind)
    caplog.set_level(logging.INFO)
    for name in ("1", "2"):
        fp.save(tmp_path / name, {"a": X}, options=QUICK)
        assert (tmp_path / f"{name}.partial_save" / "state" / "session").is_dir() != KINDS[kind]
        fp.finalize(tmp_path / name)
    texts = [one.getMessage() for one in caplog.records if "control files" in one.getMessage()]
    assert len(texts) == (0 if KINDS[kind] else 1)
    assert all(f"/scratch ({kind}) has no locks that hold between" in text for text in texts)
    assert {one.levelno for one in caplog.records if one.getMessage() in texts} <= {logging.INFO}
    warned = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warned) == (kind in BUCKETS)
    assert all(f"/scratch ({kind}) cannot rename a directory at once" in text for text in warned)


def test_the_environment_decides_before_the_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(monkeypatch, "lustre")
    for chosen, shared in (("flock", True), ("files", False), ("auto", False), ("", False)):
        monkeypatch.setenv(locks.VARIABLE, chosen)
        assert locks.are_shared(tmp_path) == shared
    monkeypatch.setenv(locks.VARIABLE, "fcntl")
    with pytest.raises(ValueError, match="FLAX_PARTIAL_LOCKS is 'auto', 'flock' or 'files'"):
        fp.save(tmp_path / "1", {"a": X})
    monkeypatch.setenv(locks.VARIABLE, "flock")
    other_systems.no_flock(monkeypatch)
    with pytest.raises(OSError, match="FLAX_PARTIAL_LOCKS=flock, and it has no locks"):
        fp.save(tmp_path / "1", {"a": X})
    assert list(tmp_path.iterdir()) == []


def test_where_names_cannot_be_put_if_absent_either_an_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_systems.no_flock(monkeypatch)
    other_systems.no_links(monkeypatch)
    other_systems.plain_c_library(monkeypatch)
    with pytest.raises(OSError, match=r"neither hard links nor exclusive renames.*LOCKS=flock"):
        fp.save(tmp_path / "1", {"a": X})


@pytest.mark.parametrize("code", ["EPERM", "ENOTSUP", "ENOSYS", "EMLINK", "EINVAL"])
def test_without_links_an_exclusive_rename_puts_if_absent(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_systems.no_links(monkeypatch, getattr(errno, code))
    store = DirectoryStore(tmp_path)
    assert store.put_new("a", b"first")
    assert not store.put_new("a", b"second")
    assert store.get("a") == b"first"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_session_goes_on_by_the_rules_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for began, goes_on in (("files", "flock"), ("flock", "files")):
        path = tmp_path / began
        for chosen, name in ((began, "a"), (goes_on, "b")):
            monkeypatch.setenv(locks.VARIABLE, chosen)
            fp.save(path, {name: X}, options=QUICK)
        fp.finalize(path)
        assert sorted(fp.load(path)) == ["a", "b"]
        for chosen in (began, goes_on):
            monkeypatch.setenv(locks.VARIABLE, chosen)
            assert fp.verify(path).ok
        assert (path / "state" / "session").is_dir() == (began == "files")


def test_part_that_comes_too_late_counts_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may have found the place of a new directory before that was renamed."""
    monkeypatch.setenv(locks.VARIABLE, "files")
    name = fp.save(tmp_path / "1", {"a": X}, options=QUICK).part
    fp.finalize(tmp_path / "1")
    (tmp_path / "1" / "state" / f"{name}late").mkdir()
    for chosen in ("files", "flock"):
        monkeypatch.setenv(locks.VARIABLE, chosen)
        assert fp.verify(tmp_path / "1").ok


@pytest.mark.usefixtures("unlocked")
def test_what_is_left_of_a_finalize_is_completed_and_of_an_abort_not(tmp_path: Path) -> None:
    fp.save(tmp_path / "1", {"a": X}, options=QUICK)
    place = places.resolve(tmp_path / "1")
    with place.locked_exclusively(lambda: None):  # and dies: its fence and its verdict stay
        found = place.read_parts()
        place.decide(found.committed, committed_ns=7)
    with pytest.raises(fp.CheckpointExistsError, match="is being finalized"):
        fp.save(tmp_path / "1", {"b": X})
    assert fp.finalize(tmp_path / "1").committed_at == 7e-9
    left = [one.name for one in (tmp_path / "1" / "state" / "session").iterdir()]
    assert sorted(name.partition(".")[2] for name in left) == ["open", "verdict"]
    fp.save(tmp_path / "2", {"a": X}, options=QUICK)
    fp.abort(tmp_path / "2")
    with pytest.raises(fp.NoSessionError):
        fp.abort(tmp_path / "2")
    assert [one.name for one in tmp_path.iterdir()] == ["1"]


@pytest.mark.usefixtures("unlocked")
def test_save_that_has_waited_for_a_verdict_has_the_finalize_list_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_objects, "_PATIENCE_SECS", 0.05)
    fp.save(tmp_path / "1", {"a": X}, options=QUICK)
    place = places.resolve(tmp_path / "1")
    with place.locked_exclusively(lambda: None):
        before = place.read_parts().committed
        fp.save(tmp_path / "1", {"late": X}, options=QUICK)
        assert place.decide(before, committed_ns=7) is None
        assert place.decide(place.read_parts().committed, committed_ns=7) == 7
    fp.finalize(tmp_path / "1")
    assert sorted(fp.load(tmp_path / "1")) == ["a", "late"]
    assert fp.verify(tmp_path / "1").ok


@pytest.mark.usefixtures("unlocked")
def test_save_whose_patience_ends_as_the_session_is_renamed_is_told_what_was_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_objects, "_PATIENCE_SECS", 0.0)
    fp.save(tmp_path / "1", {"a": X}, options=QUICK)
    place = places.resolve(tmp_path / "1")
    put_new = DirectoryStore.put_new

    def put_late(store: DirectoryStore, key: str, data: bytes) -> bool:
        if b'"void"' in data:
            place.decide(before, committed_ns=7)
            Path(place.session).rename(Path(place.final))
        return put_new(store, key, data)

    with place.locked_exclusively(lambda: None):
        before = place.read_parts().committed
        monkeypatch.setattr(DirectoryStore, "put_new", put_late)
        with pytest.raises(fp.CheckpointExistsError, match="finalized before this part was"):
            fp.save(tmp_path / "1", {"late": X}, options=QUICK)


@pytest.mark.usefixtures("unlocked")
def test_stranger_with_the_same_number_is_not_taken_for_ones_own_session(tmp_path: Path) -> None:
    """A session that was dropped, and another one in its place: a save does not count as saved."""
    fp.save(tmp_path / "1", {"a": X}, options=QUICK)
    control = tmp_path / "1.partial_save" / "state" / "session" / "0.open"
    real = places.resolve(tmp_path / "1")
    opened = real.enter(None)
    new = real.create_part(f"part.{0:019d}.p0.{opened.mark}{opened.mark}")
    control.write_text(json.dumps({"id": "another12345"}))
    with pytest.raises(fp.NoSessionError, match="aborted before this part was written"):
        new.commit(b"{}", has_data_file=False, durable=False)


@pytest.mark.usefixtures("unlocked")
def test_listing_of_a_directory_that_is_renamed_meanwhile_lacks_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that saw the session, and not the verdict beside it, would take itself to count."""
    store = DirectoryStore(tmp_path / "10.partial_save")
    (tmp_path / "10.partial_save").mkdir()
    names = {"0.open", "a.closing.b", "a.verdict"}
    for name in names:
        store.put_new(name, b"{}")
    listed = os.scandir

    def renamed_while_listed(path: Path) -> Iterator[os.DirEntry[str]]:
        for number, entry in enumerate(list(listed(path))):
            if number == 1:
                (tmp_path / "10.partial_save").rename(tmp_path / "10")
            yield entry

    monkeypatch.setattr(directory_store.os, "scandir", renamed_while_listed)
    assert {entry.key for entry in store.list()} == names


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no directory by its descriptor")
@pytest.mark.usefixtures("unlocked")
def test_session_that_is_begun_late_hides_none_in_a_newer_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number follows those of a directory that is gone by then."""
    final, session = tmp_path / "10", tmp_path / "10.partial_save"
    control = session / "state" / "session"
    control.mkdir(parents=True)
    for name, text in (("3.open", {"id": "old"}), ("old.verdict", {"kind": "abort"})):
        (control / name).write_text(json.dumps(text))
    look = UnlockedPlace._list_control_unpublished  # noqa: SLF001
    others: list[OpenSession] = []

    def look_and_sleep(place: UnlockedPlace) -> object:
        found = look(place)
        if not others:
            monkeypatch.undo()
            shutil.rmtree(session)
            others.append(UnlockedPlace(final, session).enter(None))
        return found

    monkeypatch.setattr(UnlockedPlace, "_list_control_unpublished", look_and_sleep)
    entered = UnlockedPlace(final, session).enter(None)
    assert entered.mark == others[0].mark
    assert sorted(one.name for one in control.iterdir()) == ["0.open"]


@pytest.mark.usefixtures("unlocked")
def test_abort_beside_which_a_session_begins_has_dropped_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp.save(tmp_path / "1", {"a": X}, options=QUICK)
    put = UnlockedPlace._put_verdict  # noqa: SLF001
    is_open = UnlockedPlace._is_open  # noqa: SLF001

    def begin_and_look(place: UnlockedPlace, session: Listed) -> bool:
        UnlockedPlace(place.final, place.session).enter(None)
        return is_open(place, session._replace(control=place._control_names()))  # noqa: SLF001

    def put_verdict(place: UnlockedPlace, verdict: Verdict) -> Verdict:
        with monkeypatch.context() as patch:
            patch.setattr(UnlockedPlace, "_is_open", begin_and_look)
            return put(place, verdict)

    monkeypatch.setattr(UnlockedPlace, "_put_verdict", put_verdict)
    fp.abort(tmp_path / "1")
    control = tmp_path / "1.partial_save" / "state" / "session"
    assert len(list(control.glob("*.open"))) == 2
    assert fp.status(tmp_path / "1").leaves == ()


@pytest.mark.parametrize(
    ("others", "opening", "is_open"),
    [
        pytest.param({}, "1.old.open", True, id="after_one_whose_files_are_gone"),
        pytest.param({"1.old.open": "other"}, "0.open", False, id="late_beside_a_newer_one"),
        pytest.param({"1.mine.open": "other"}, "0.open", True, id="ended_before_a_newer_one"),
    ],
)
def test_session_is_there_as_the_newest_or_as_one_that_ended(
    others: dict[str, str], opening: str, *, is_open: bool, tmp_path: Path
) -> None:
    final, session = tmp_path / "10", tmp_path / "10.partial_save"
    control = session / "state" / "session"
    control.mkdir(parents=True)
    for name, mark in {**others, opening: "mine"}.items():
        (control / name).write_text(json.dumps({"id": mark}))
    if "1.mine.open" in others:
        (control / "mine.verdict").write_text(json.dumps({"kind": "abort"}))
    place = UnlockedPlace(final, session)
    assert place._is_open(Listed(opening, "mine", place._control_names())) == is_open  # noqa: SLF001
    assert place.enter(None).mark == next(iter(others.values()), "mine")


@pytest.mark.usefixtures("unlocked")
def test_session_that_begins_while_an_abort_removes_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp.save(tmp_path / "1", {"a": X}, options=QUICK)
    remove = session_dir.remove_part

    def begin_and_remove(place: UnlockedPlace, name: str) -> None:
        monkeypatch.setattr(session_dir, "remove_part", remove)
        fp.save(tmp_path / "1", {"b": X}, options=QUICK)
        remove(place, name)

    monkeypatch.setattr(session_dir, "remove_part", begin_and_remove)
    fp.abort(tmp_path / "1")
    fp.save(tmp_path / "1", {"c": X}, options=QUICK)
    fp.finalize(tmp_path / "1")
    assert sorted(fp.load(tmp_path / "1")) == ["b", "c"]


@pytest.mark.usefixtures("unlocked")
def test_directory_of_an_abort_that_dies_is_removed_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp.save(tmp_path / "1", {"a": X}, options=QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(UnlockedPlace, "_remove_closed", lambda *_: None)
        fp.abort(tmp_path / "1")
    assert (tmp_path / "1.partial_save").is_dir()
    for call in (fp.status, fp.finalize, fp.abort):
        with pytest.raises(fp.NoSessionError):
            call(tmp_path / "1")
    monkeypatch.setattr(unlocked_place, "_PAUSE_SECS", 0.0)
    fp.save(tmp_path / "1", {"b": X}, options=QUICK)
    fp.finalize(tmp_path / "1")
    assert sorted(fp.load(tmp_path / "1")) == ["b"]
    assert [one.name for one in tmp_path.iterdir()] == ["1"]


@pytest.mark.usefixtures("unlocked")
def test_reader_is_told_that_what_it_reads_was_removed(tmp_path: Path) -> None:
    fp.save(tmp_path / "1", {"a": X}, options=QUICK)
    fp.finalize(tmp_path / "1")
    place = places.resolve(tmp_path / "1")

    def read() -> None:
        with place.reading():
            (tmp_path / "1").rename(tmp_path / "away")
            (tmp_path / "1" / "state" / "contents.json").read_bytes()

    with pytest.raises(fp.NoSessionError, match="was removed while it was read"):
        read()


@pytest.mark.usefixtures("unlocked")
def test_verify_beside_a_removal_reports_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp.save(tmp_path / "1", {"a": X}, options=QUICK)
    fp.finalize(tmp_path / "1")
    other_systems.no_flock(monkeypatch)
    read = UnlockedPlace.read_own_parts

    def remove_and_read(place: UnlockedPlace) -> object:
        fp.remove(tmp_path / "1")
        return read(place)

    monkeypatch.setattr(UnlockedPlace, "read_own_parts", remove_and_read)
    with pytest.raises(fp.NoSessionError, match="was removed while it was read"):
        fp.verify(tmp_path / "1")


@pytest.mark.usefixtures("unlocked")
def test_removals_beside_each_other_remove_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is told that there is none, even if it is removed, or another, at the last moment."""
    other_systems.no_flock(monkeypatch)
    rename = files.rename_away

    def remove(*, then_save: bool) -> None:
        monkeypatch.setattr(files, "rename_away", rename)
        fp.remove(tmp_path / "1")
        if then_save:
            fp.save(tmp_path / "1", {"b": X}, options=QUICK)
            fp.finalize(tmp_path / "1")

    for then_save in (False, True):
        fp.save(tmp_path / "1", {"a": X}, options=QUICK)
        fp.finalize(tmp_path / "1")

        def late(directory: Path, *, then_save: bool = then_save) -> Path:
            remove(then_save=then_save)
            return rename(directory)

        monkeypatch.setattr(files, "rename_away", late)
        with pytest.raises(fp.NoSessionError, match="There is no checkpoint"):
            fp.remove(tmp_path / "1")
        assert [one.name for one in tmp_path.iterdir()] == ["1"] * then_save
    assert sorted(fp.load(tmp_path / "1")) == ["b"]


def test_tree_that_others_change_meanwhile_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as by a save into a session's directory that was finalized and is being removed."""
    tree = tmp_path / "1" / "state"
    tree.mkdir(parents=True)
    remove, late = os.rmdir, ["late"]

    def make_and_remove(path: object, **how: int) -> None:
        if late:
            (tree / late.pop()).mkdir()
        remove(path, **how)

    monkeypatch.setattr(os, "rmdir", make_and_remove)
    files.remove_tree(tmp_path / "1")
    assert list(tmp_path.iterdir()) == []


def test_all_at_once_is_as_if_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seconds of `stress.py --locks files`, which says what holds; a script for longer."""
    monkeypatch.setenv(locks.VARIABLE, "files")
    how = {"processes": 4, "threads": 4, "seed": 11}
    count, faults = stress.run(tmp_path, **how, secs=2.0, locks="files")
    assert not faults, "\n".join(faults[:20])
    assert count > 100
