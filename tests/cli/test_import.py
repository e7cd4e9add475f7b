"""`import`: what is made of files of others is what they hold, whole, and takes no memory."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
import trees
from memory import forget_peak, status_bytes
from orbax.checkpoint.experimental import v1
from safetensors.numpy import save_file
from shell import MIXED, Shell, begin, write
from terminal import on_terminal
from things import listing

import flax_partial as fp
from flax_partial.cli import pieces, safetensors
from flax_partial.cli.main import INTERRUPTED, PROBLEM, TERMINATED, WRONG_USE
from flax_partial.errors import UnsupportedLeafError


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


EVERY = {
    **MIXED,
    "params": [{"w.x": np.arange(600.0).reshape(20, 30), "b": jnp.ones(3)}, {"b": jnp.zeros(3)}],
    "numbered": {1: np.int8(3), 10: 2.5},
    "key": jax.random.key(5),
    "bytes": b"\xff\x00",
    "zero": np.ones((0, 3)),
}


def test_what_was_exported_comes_back_as_it_was(tmp_path: Path, shell: Shell) -> None:
    fp.save("a", {}, training={"step": 3})
    write(tmp_path / "a", EVERY, note={"by": "me", "count": 10**30})
    shell.run("export", "a", "file")
    report = shell.json("import", "file", "b")
    assert (report["format"], report["leaves"]) == ("safetensors", len(fp.metadata("a").leaves))
    shell.run("diff", "a", "b")
    a, b = fp.metadata("a"), fp.metadata("b")
    assert a.custom_metadata == b.custom_metadata
    assert b.training == {"step": 3}
    assert {n: (one.kind, one.dtype) for n, one in a.leaves.items()} == {
        n: (one.kind, one.dtype) for n, one in b.leaves.items()
    }
    assert jax.tree.structure(fp.load("a")) == jax.tree.structure(fp.load("b"))
    assert fp.load("b")["bytes"] == b"\xff\x00"
    assert fp.verify("b").ok


@pytest.mark.parametrize("name", [name for name in trees.DTYPES if name != "complex128"])
def test_every_dtype_comes_back(name: str, tmp_path: Path, shell: Shell) -> None:
    write(tmp_path / "a", {"w": trees.random_bits(name, (300,), 1)})
    shell.run("export", "a", "file")
    shell.run("import", "file", "b")
    was, got = fp.load("a")["w"], fp.load("b")["w"]
    assert got.dtype == was.dtype
    if name in safetensors.WIDER:  # in which a NaN is any NaN
        assert np.array_equal(was.astype(float), got.astype(float), equal_nan=True)
    else:
        assert got.tobytes() == was.tobytes()


def test_files_of_others_are_read_as_nested_dicts(shell: Shell) -> None:
    layers = [np.random.default_rng(i).random((7, 5), np.float32) for i in range(2)]
    for number, layer in enumerate(layers):
        save_file({f"layers.{number}.w": layer}, f"{number}.st", metadata={"format": "pt"})
    shell.run("import", "0.st", "1.st", "c")
    got = fp.load("c")
    for number, layer in enumerate(layers):
        assert np.array_equal(got["layers"][str(number)]["w"], layer)
    assert fp.metadata("c").custom_metadata == {"format": "pt"}
    target = {"layers": [{"w": jax.ShapeDtypeStruct((7, 5), np.float32)}] * 2}
    assert np.array_equal(fp.load("c", target)["layers"][1]["w"], layers[1])
    shell.run("import", "0.st", "0.st", "d", status=PROBLEM)
    assert "0.st: 'layers.0.w' is in another file, too" in shell.error
    shell.run("import", "0.st", "1.st", "d", "--only", "layers.1")
    assert list(fp.metadata("d").leaves) == ["layers.1.w"]


STATE = {
    "w": np.arange(12.0).reshape(3, 4),
    "list": [jnp.ones(3, jnp.bfloat16), {"key": jax.random.key(1)}],
    "text": "x",
    "none": None,
}


def test_what_orbax_wrote_becomes_ours(tmp_path: Path, shell: Shell) -> None:
    v1.save(tmp_path / "a", STATE)
    assert shell.json("import", "a", "b")["format"] == "orbax"
    assert shell.json("show", "b")["format"] == "flax_partial"
    shell.run("diff", "a", "b")
    a, b = (fp.metadata(path).leaves for path in "ab")
    assert dict(a) == dict(b)  # kinds and shardings, too
    assert fp.verify("b").ok


def test_run_of_orbax_stands_for_its_newest_checkpoint_and_metrics_come_along(
    tmp_path: Path, shell: Shell
) -> None:
    options = v0.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"])
    with v0.CheckpointManager(tmp_path / "run", options=options) as manager:
        for step in (0, 1):
            state = v0.args.StandardSave({"w": jnp.ones(step + 1)})
            manager.save(step, args=state, metrics={"loss": 0.5 - step})
    shell.run("import", "run", "best")
    assert "run is a run: its newest finalized checkpoint is run/1" in shell.error
    best = fp.metadata("best")
    assert (best.training, best.custom_metadata) == ({"step": 1}, {"metrics": {"loss": -0.5}})
    shell.run("import", "run/0", "zero")
    assert fp.metadata("zero").training == {"step": 0}


def test_leaves_are_read_and_saved_piece_by_piece(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_AT_ONCE_BYTES", 3 << 20)
    rng = np.random.default_rng(0)
    state = {"w": rng.random((1, 5, 300_001), np.float32), "v": rng.random((9, 3)), "u": 1}
    save_file({name: np.asarray(value) for name, value in state.items()}, "file")
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", state)
    for source in ("file", "orbax"):
        shell.run("import", source, f"of_{source}")
        assert fp.metadata(f"of_{source}").parts >= 2
        got = fp.load(f"of_{source}")
        assert all(np.array_equal(got[name], value) for name, value in state.items())
        assert fp.verify(f"of_{source}").ok


def file_of(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


GOOD = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
DAMAGED = {
    "empty": b"",
    "short": b"\x02",
    "text": b"no safetensors file at all",
    "no table": file_of(b"[]", b""),
    "no tensor": file_of(b'{"w": 3}', b""),
    "cut": file_of(json.dumps(GOOD).encode(), b"1234567"),
    "longer": file_of(json.dumps(GOOD).encode(), b"123456789"),
    "wrong size": file_of(json.dumps({"w": {**GOOD["w"], "shape": [3]}}).encode(), b"12345678"),
    "huge": file_of(json.dumps({"w": {**GOOD["w"], "shape": [2**62, 8]}}).encode(), b"12345678"),
    "gap": file_of(json.dumps({"w": {**GOOD["w"], "data_offsets": [1, 9]}}).encode(), b"123456789"),
    "ours is none": file_of(b'{"__metadata__":{"flax_partial":"[]"}}', b""),
    "empty leaf": file_of(
        json.dumps({"__metadata__": {"flax_partial": '{"empty":{"w":"scalar"}}'}}).encode(), b""
    ),
    "keys": file_of(
        json.dumps(
            {**GOOD, "__metadata__": {"flax_partial": '{"keys":{"w":[["v"],"d"]}}'}}
        ).encode(),
        b"12345678",
    ),
    "kind": file_of(
        json.dumps({**GOOD, "__metadata__": {"flax_partial": '{"kinds":{"w":"string"}}'}}).encode(),
        b"12345678",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_refused_before_anything_is_written(
    case: str, tmp_path: Path, shell: Shell
) -> None:
    (tmp_path / "file").write_bytes(DAMAGED[case])
    shell.run("import", "file", "c", status=PROBLEM)
    assert shell.error.startswith("flax-partial: file: ")
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_tensors_that_no_checkpoint_can_hold_are_named() -> None:
    table = {name: {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]} for name in "ab"}
    with pytest.raises(UnsupportedLeafError, match=r"'a' is F4\[2\]\n  'b' is F4"):
        safetensors.parse(json.dumps(table).encode(), 10_000)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("absent c", "absent does not exist"),
        ("hdfs://b/file c", "is a URL"),
        ("file hdfs://b/c", "is a URL"),
        ("fil c", "fil does not exist; there is file"),
        ("ours c", "ours is a checkpoint of flax_partial already"),
        ("file ours", "ours exists already"),
        ("file begun", "begun.partial_save exists already"),
        ("file absent/c", "absent is not a directory"),
        ("file ours c", "ours is a directory: only files can be several"),
        ("file c --only v", "is called 'v'; there is w"),
        ("none c", "none holds nothing"),
    ],
)
def test_what_cannot_be_imported_is_refused(
    arguments: str, why: str, tmp_path: Path, shell: Shell
) -> None:
    save_file({"w": np.ones(2)}, "file")
    save_file({}, "none")
    write(tmp_path / "ours", {"w": 1})
    begin(tmp_path / "begun", {"w": 1})
    before = listing(tmp_path)
    shell.run("import", *arguments.split(), status=WRONG_USE)
    assert why in shell.error
    assert listing(tmp_path) == before


def test_leaf_and_subtree_of_one_name_leave_nothing(tmp_path: Path, shell: Shell) -> None:
    save_file({"w": np.ones(2), "w.v": np.ones(2)}, "file")
    shell.run("import", "file", "c", status=PROBLEM)
    assert "w.v" in shell.error
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]
    shell.run("import", "file", "c", "--skip", "w.v")


def test_file_that_becomes_shorter_meanwhile_leaves_nothing(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_AT_ONCE_BYTES", 1000)
    save_file({"a": np.ones(100), "b": np.ones(100)}, "file", metadata={"by": "me"})
    preadv = os.preadv

    def read_and_cut(*arguments: Any) -> int:
        assert (tmp_path / "c.partial_save").is_dir()
        count = preadv(*arguments)
        os.truncate("file", 1000)
        return count

    monkeypatch.setattr("os.preadv", read_and_cut)
    shell.run("import", "file", "c", status=PROBLEM)
    assert "Leaf 'b': its file became shorter meanwhile" in shell.error
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, INTERRUPTED)]
)
def test_import_that_is_told_to_stop_leaves_nothing(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    save_file({name: np.ones(9 << 20, np.float32) for name in "abc"}, "file")
    with on_terminal("import", tmp_path / "file", tmp_path / "c", slow_secs=60) as terminal:
        while not [*tmp_path.glob("c.partial_save/state/*/part.json")]:
            time.sleep(0.01)
        os.kill(terminal.pid, number)
        assert terminal.end() == status
        assert "Traceback" not in terminal.shown
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_large_tensor_takes_no_more_memory_than_a_batch(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_AT_ONCE_BYTES", 4 << 20)
    header = {"w": {"dtype": "F32", "shape": [24 << 20], "data_offsets": [0, 96 << 20]}}
    begins = file_of(json.dumps(header).encode(), b"")
    with (tmp_path / "file").open("wb") as file:  # sparse: zeros
        file.write(begins)
        file.truncate(len(begins) + (96 << 20))
    save_file({"w": np.ones(3)}, "small")
    shell.run("import", "small", "warm")
    forget_peak()
    before = status_bytes("VmRSS")
    shell.run("import", "file", "c")
    assert status_bytes("VmHWM") - before < 64 << 20
