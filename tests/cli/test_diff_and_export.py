"""`diff` and `export`: what is made of a checkpoint's data is right, whole, and takes no memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import trees
from memory import forget_peak, status_bytes
from orbax.checkpoint.experimental import v1
from safetensors import safe_open
from safetensors.flax import load_file
from shell import MIXED, Shell, flip_a_bit_of, write

import flax_partial as fp
from flax_partial.cli import pieces
from flax_partial.cli.main import PROBLEM
from flax_partial.cli.safetensors import WIDER

# --- diff


def changes(shell: Shell, a: Path, b: Path, *options: str) -> dict[str, Any]:
    got = shell.json("diff", a, b, *options, status=PROBLEM)["changes"]
    return {change["name"]: change for change in got}


def test_diff_of_the_same_finds_nothing(tmp_path: Path, shell: Shell) -> None:
    a, b = write(tmp_path / "a", MIXED), write(tmp_path / "b", MIXED)
    assert shell.json("diff", a, b) == {"a": str(a), "b": str(b), "same": 9, "changes": []}
    assert shell.run("diff", a, b) == "changed: 0 leaves, the same: 9 leaves\n"
    flip_a_bit_of(a, MIXED["params"]["w"])
    assert shell.json("diff", a, b)["changes"] == []  # equal digests: it is not read


ARRAY, KEY = np.array([1.0, 2.0, 2.0, np.nan]), jax.random.key(0)
CHANGED = {  # name: in A, in B, what diff calls it
    "bytes": (b"a", b"b", "values"),
    "dtype": (np.array([1.0, 2.0], np.float32), np.array([1.0, 2.5]), "dtype"),
    "gone": (1, ..., "removed"),
    "impl": (KEY, jax.random.key(0, impl="rbg"), "shape"),
    "key": (KEY, jax.random.key(1), "values"),
    "kind": (np.ones(2), "text", "kind"),
    "new": (..., None, "added"),
    "same": (jnp.ones(2, jnp.bfloat16), np.ones(2, ml_dtypes.bfloat16), None),
    "shape": (np.ones((2, 3)), np.ones((3, 2)), "shape"),
    "text": ("a", "b", "values"),
    "values": (ARRAY, np.array([1.0, 5.0, np.inf, np.nan]), "values"),
}


def test_diff_tells_every_kind_of_change(tmp_path: Path, shell: Shell) -> None:
    a, b = (
        write(
            tmp_path / side, {key: row[i] for key, row in CHANGED.items() if row[i] is not Ellipsis}
        )
        for i, side in enumerate("ab")
    )
    found = changes(shell, a, b)
    expected = {name: row[2] for name, row in CHANGED.items() if row[2]}
    assert {name: change["change"] for name, change in found.items()} == expected
    numbers = {"elements": 4, "different": 2, "not_finite": 1, "largest": 3.0, "relative": 1.0}
    assert found["values"]["difference"] == numbers
    assert found["dtype"]["difference"]["largest"] == 0.5
    assert found["key"]["difference"] == {"elements": 2, "different": 1}
    assert found["text"]["b"] == {"kind": "string", "shape": [], "dtype": "", "text": "b"}
    lines = shell.run("diff", a, b, status=PROBLEM).splitlines()
    assert lines[-1] == "changed: 10 leaves, the same: 1 leaf"
    (row,) = [" ".join(line.split()) for line in lines if line.startswith("values")]
    assert row == "values values float64(4,) 2 of 4 3, 1 nan/inf 1"


def test_diff_of_what_orbax_wrote_is_by_value(tmp_path: Path, shell: Shell) -> None:
    state = {"w": jnp.ones((4, 4)), "b": jnp.zeros(3, jnp.bfloat16), "n": 3, "s": "x", "e": None}
    v1.save(tmp_path / "a", state)
    ours = write(tmp_path / "b", state)
    assert shell.json("diff", tmp_path / "a", ours)["same"] == 5
    other = write(tmp_path / "c", {**state, "w": jnp.ones((4, 4)).at[1, 2].set(3.0)})
    assert changes(shell, tmp_path / "a", other)["w"]["difference"]["different"] == 1


@pytest.mark.parametrize(
    ("options", "names"), [("--only x", ["x.p"]), ("--skip x", ["y", "z"]), ("--only z", ["z"])]
)
def test_diff_looks_only_at_what_is_chosen(
    options: str, names: list[str], tmp_path: Path, shell: Shell
) -> None:
    a = write(tmp_path / "a", {"x": {"p": 1, "q": 1}, "y": 1})
    b = write(tmp_path / "b", {"x": {"p": 2, "q": 1}, "z": 1})
    assert list(changes(shell, a, b, *options.split())) == names


def test_diff_names_what_cannot_be_read(tmp_path: Path, shell: Shell) -> None:
    a = write(tmp_path / "a", MIXED)
    changed = {"w": MIXED["params"]["w"] + 1, "b": jnp.ones(3)}
    b = write(tmp_path / "b", {**MIXED, "params": changed})
    flip_a_bit_of(b, changed["w"])
    found = changes(shell, a, b)
    said = {name: change["change"] for name, change in found.items()}
    assert said == {"params.b": "values", "params.w": "unreadable"}
    assert found["params.w"]["problem"].startswith("B: Leaf 'params.w'")
    assert "B: Leaf 'params.w'" in shell.run("diff", a, b, status=PROBLEM)


def test_leaves_in_other_chunks_are_compared_piece_by_piece(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_AT_ONCE_BYTES", 1000)
    array = np.random.default_rng(0).random((50, 7, 11))
    changed = array.copy()
    changed[::7, 3] += 0.5
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for path, value, chunk_bytes in ((a, array, 300), (b, array, 5000), (c, changed, 77)):
        fp.save(path, {"w": value}, options=fp.SaveOptions(durable=False, chunk_bytes=chunk_bytes))
        fp.finalize(path)
    assert shell.json("diff", a, b)["same"] == 1
    found = changes(shell, a, c)["w"]["difference"]
    assert (found["elements"], found["different"]) == (3850, 8 * 11)
    assert found["largest"] == pytest.approx(0.5)
    norm = np.linalg.norm(array - changed) / np.linalg.norm(array)
    assert found["relative"] == pytest.approx(norm)


# --- export


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in load_file(path).items()}


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, "flax") as file:
        metadata = file.metadata()
    assert metadata["format"] == "flax"
    return dict(json.loads(metadata["flax_partial"]))


def no_file(directory: Path) -> bool:
    return not [path for path in directory.iterdir() if path.is_file()]


def test_exported_arrays_are_read_back_by_safetensors(
    tmp_path: Path, out: Path, shell: Shell
) -> None:
    names = ("bool", "int8", "int32", "uint32", "float16", "bfloat16", "float32", "complex64")
    state = {name: trees.random_bits(name, (5, 3), 0) for name in names}
    more = {"none": None, "n": np.int8(3), "zero": np.ones((0, 3))}
    report = shell.json("export", write(tmp_path / "c", {"a": state, **more}), out)
    assert (report["tensors"], report["bytes"]) == (10, out.stat().st_size)
    assert report["in_metadata"] == ["none"]
    read = tensors(out)
    assert set(read) == {f"a.{name}" for name in names} | {"n", "zero"}
    for name in names:
        assert read[f"a.{name}"].dtype == trees.numpy_dtype(name)
        assert read[f"a.{name}"].tobytes() == state[name].tobytes(), name
    assert read["n"] == 3
    assert read["zero"].shape == (0, 3)


@pytest.mark.parametrize("name", [name for name in trees.DTYPES if name != "complex128"])
def test_every_dtype_is_exported_with_all_its_values(
    name: str, tmp_path: Path, out: Path, shell: Shell
) -> None:
    array = trees.random_bits(name, (300,), 1)
    shell.run("export", write(tmp_path / "c", {"w": array}), out)
    with safe_open(out, "np") as file:
        assert file.get_slice("w").get_shape() == [300]  # what the reader makes of the header
    stored = trees.numpy_dtype(WIDER.get(name, name))
    got = np.frombuffer(out.read_bytes()[-300 * stored.itemsize :], stored)
    if name not in WIDER:
        assert got.tobytes() == array.tobytes()
    else:
        assert np.array_equal(got.astype(float), array.astype(float), equal_nan=True)
        assert header(out)["dtypes"] == {"w": name}


def test_what_is_no_tensor_is_kept_in_the_header(tmp_path: Path, out: Path, shell: Shell) -> None:
    key = jax.random.key(5)
    path = write(tmp_path / "c", {**MIXED, "key": key}, step=3)
    shell.run("export", path, out, "--skip", "eighth")  # safetensors.flax does not know it
    assert header(out) == {
        "custom_metadata": {"step": 3},
        "strings": {"text": "a\x1b[31m"},
        "empty": {"empty": "dict", "nothing": "None"},
        "prng_keys": {"key": "threefry2x32"},
        "dtypes": {"tiny": "int4"},
        "kinds": {"half": "jax.Array", "params.b": "jax.Array", "step": "scalar"},
    }
    assert np.array_equal(tensors(out)["key"], jax.random.key_data(key))


def test_leaves_in_chunks_of_many_axes_are_written_where_they_belong(
    tmp_path: Path, out: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_AT_ONCE_BYTES", 500)
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y", "z"))
    array = np.arange(8 * 6 * 10.0, dtype=np.float32).reshape(8, 6, 10)
    state = {"w": jax.device_put(array, sharding), "v": array.T.copy(), "u": array[0]}
    shell.run("export", write(tmp_path / "c", state), out)
    read = tensors(out)
    for name, value in state.items():
        assert np.array_equal(read[name], value), name


def test_export_of_what_orbax_wrote(tmp_path: Path, out: Path, shell: Shell) -> None:
    state = {"a": {"w": jnp.arange(12.0).reshape(3, 4)}, "s": "x"}
    v1.save(tmp_path / "c", state)
    shell.run("export", tmp_path / "c", out, "--only", "a")
    read = tensors(out)
    assert list(read) == ["a.w"]
    assert np.array_equal(read["a.w"], state["a"]["w"])


def test_a_damaged_leaf_leaves_no_file(tmp_path: Path, out: Path, shell: Shell) -> None:
    path = write(tmp_path / "c", MIXED)
    flip_a_bit_of(path, MIXED["params"]["w"])
    shell.run("export", path, out, status=PROBLEM)
    assert "'params.w'" in shell.error
    assert no_file(tmp_path)
    shell.run("export", path, out, "--skip", "params.w")


def test_what_safetensors_cannot_hold_is_named_before_anything_is_written(
    tmp_path: Path, out: Path, shell: Shell
) -> None:
    path = write(tmp_path / "c", {"w": np.ones(2, complex), "v": 1})
    shell.run("export", path, out, status=PROBLEM)
    assert "'w' is complex128" in shell.error
    assert no_file(tmp_path)


def test_export_replaces_no_file_that_appears_meanwhile(
    tmp_path: Path, out: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c", {"w": np.ones(3)})
    pwrite = os.pwrite

    def write_late(*arguments: Any) -> int:
        out.write_text("another program's")
        return pwrite(*arguments)

    monkeypatch.setattr("os.pwrite", write_late)
    shell.run("export", path, out, status=PROBLEM)
    assert out.read_text() == "another program's"
    out.unlink()
    assert no_file(tmp_path)


def test_file_that_appears_is_durable_and_as_readable_as_any(
    tmp_path: Path, out: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c", {"w": np.ones(3)})
    synced: list[bool] = []
    fsync = os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: (synced.append(out.exists()), fsync(fd))[1])
    shell.run("export", path, out)
    assert synced == [False, True]  # the file, and after the rename its directory
    (tmp_path / "plain").touch()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- memory


@pytest.mark.parametrize(("command", "status"), [("diff a b", PROBLEM), ("export a out", 0)])
def test_a_leaf_takes_no_more_memory_than_a_batch(
    command: str,
    status: int,
    *,
    tmp_path: Path,
    shell: Shell,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "_AT_ONCE_BYTES", 4 << 20)
    monkeypatch.chdir(tmp_path)
    array = np.ones((24 << 20, 2), np.float16)  # 96 MiB
    write(tmp_path / "a", {"w": array})
    write(tmp_path / "b", {"w": array + 1})
    del array
    forget_peak()
    before = status_bytes("VmRSS")
    shell.run(*command.split(), status=status)
    assert status_bytes("VmHWM") - before < 64 << 20
