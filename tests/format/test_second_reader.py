"""docs/format.md is enough to write a reader: one that knows nothing else reads what was saved."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from itertools import product
from operator import add
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import second_reader
from documents import ROOT
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCRIPT = ROOT / "examples" / "second_reader.py"
PAGE = ROOT / "docs" / "format.md"
SMALL_CHUNKS = fp.SaveOptions(chunk_bytes=4096)


def saved(path: Path) -> dict[str, Any]:
    """Saves leaves of every kind and layout, in several parts; returns them by name."""
    numbers = np.random.default_rng(0)
    large = numbers.standard_normal((100, 77))
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    sharded = jax.device_put(
        np.arange(64 * 96, dtype=np.int32).reshape(64, 96),
        NamedSharding(mesh, PartitionSpec("a", "b")),
    )
    prime = numbers.integers(0, 255, (8191,), np.uint8)  # divided by no chunk
    key = jax.random.key(7)
    halves = jnp.arange(3000, dtype=jnp.bfloat16)
    rows = np.arange(6 * 700, dtype=np.float32).reshape(6, 700)
    few = np.array([[1, -2], [3, -4]], ml_dtypes.int4)
    fp.save(path, {"old": np.zeros(5), "large": large, "rows": fp.Slice(rows[4:], 4, 6)})
    fp.save(path, {"sharded": sharded, "prime": prime}, options=SMALL_CHUNKS)
    fp.save(path, {"old": np.ones((2, 3), bool), "key": key, "few": few}, replace=True)
    fp.save(path, {"rows": fp.Slice(rows[:4], 0, 6), "halves": halves, "at": [1, 2.5, 3j, True]})
    fp.save(path, {"text": "naïve", "": "", "none": None, "empty": {"d": {}, "l": [], "t": ()}})
    fp.save(path, {"scalar": np.float16(1.5), "nothing": np.zeros((0, 3)), "e.f": {"g/": 1}})
    return {
        "old": np.ones((2, 3), bool),
        "large": large,
        "rows": rows,
        "sharded": np.asarray(sharded),
        "prime": prime,
        "key": np.asarray(jax.random.key_data(key)),
        "few": few.view(np.uint8)[..., np.newaxis],
        "halves": np.asarray(halves).view(np.uint8).reshape(3000, 2),
        "at.0": np.asarray(1),
        "at.1": np.asarray(2.5),
        "at.2": np.asarray(3j),
        "at.3": np.asarray(True),  # noqa: FBT003 - an array of it
        "text": "naïve",
        "": "",
        "none": None,
        "empty.d": {},
        "empty.l": [],
        "empty.t": (),
        "scalar": np.float16(1.5),
        "nothing": np.zeros((0, 3)),
        "e.f.g/": np.asarray(1),
    }


@pytest.mark.parametrize("read", ["ckpt.partial_save", "ckpt"])
def test_reads_leaves_of_every_kind_as_they_were_saved(tmp_path: Path, read: str) -> None:
    expected = saved(tmp_path / "ckpt")
    if read == "ckpt":
        fp.finalize(tmp_path / "ckpt")
    found = second_reader.read_checkpoint(tmp_path / read)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert type(found[name]) is (np.ndarray if hasattr(value, "dtype") else type(value)), name
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert getattr(found[name], "dtype", None) == getattr(value, "dtype", None), name


def test_runs_of_the_merged_table_lead_to_the_chunks(tmp_path: Path) -> None:
    expected = saved(tmp_path / "ckpt")
    fp.finalize(tmp_path / "ckpt")
    table = second_reader.read_table(tmp_path / "ckpt" / "state" / "contents.json")
    with_runs = {".".join(leaf["path"]): leaf for leaf in table["leaves"] if "runs" in leaf}
    assert with_runs.keys() >= {"large", "sharded", "prime", "rows"}
    for name, leaf in with_runs.items():
        chunks = chunks_by_runs(tmp_path / "ckpt" / "state", table["data_parts"], leaf)
        ((start, shape, digests, *_),) = leaf["boxes"]
        corners = product(*map(range, start, shape, leaf["chunk"]))
        for corner, digest, data in zip(corners, digests, chunks, strict=True):
            index = tuple(map(slice, corner, map(add, corner, leaf["chunk"])))
            piece = expected[name][index]
            assert second_reader.digest_of(piece.tobytes()) == digest, name
            assert piece.nbytes < len(data) or piece.tobytes() == data, name


def chunks_by_runs(state: Path, parts: list[str], leaf: dict[str, Any]) -> Iterator[bytes]:
    dtype, inner = second_reader.stored_as(leaf["dtype"])
    size = math.prod([dtype.itemsize, *inner, *leaf["chunk"]])
    for part, offset, count in leaf["runs"]:
        name = parts[part] if "/" in parts[part] else f"{parts[part]}/data"
        for number in range(count):
            place = [offset + number * size, size]
            yield second_reader.read_place(state / name, place)


def test_reads_files_that_another_checkpoint_shares(tmp_path: Path) -> None:
    frozen, trained = jnp.arange(50_000.0), jnp.zeros(3000)  # less than 64 KiB is not shared
    for step in (1, 2):
        state = {"frozen": frozen, "trained": trained + step}
        earlier = tmp_path / "1" if step == 2 else None
        for name, leaf in state.items():
            fp.save(tmp_path / str(step), {name: leaf}, reuse=earlier)
        fp.finalize(tmp_path / str(step))
    assert list(tmp_path.glob("2/state/part.*/data.1"))
    found = second_reader.read_checkpoint(tmp_path / "2")
    np.testing.assert_array_equal(found["frozen"], frozen)
    np.testing.assert_array_equal(found["trained"], trained + 2)


def test_damage_to_each_file_is_told(tmp_path: Path) -> None:
    saved(tmp_path / "ckpt")
    fp.finalize(tmp_path / "ckpt")
    files = sorted((tmp_path / "ckpt").glob("state/part.*/*"))
    assert {file.name for file in files} == {"data", "part.json"}
    for file in files:
        data = file.read_bytes()
        at = len(data) // 2 if file.name == "part.json" else 100
        file.write_bytes(data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            second_reader.read_checkpoint(tmp_path / "ckpt")
        file.write_bytes(data)
    second_reader.read_checkpoint(tmp_path / "ckpt")


def test_lost_part_is_told(tmp_path: Path) -> None:
    rows = np.arange(12.0).reshape(3, 4)
    fp.save(tmp_path / "ckpt", {"w": fp.Slice(rows[:2], 0, 3)})
    with pytest.raises(ValueError, match="w is not complete"):
        second_reader.read_checkpoint(tmp_path / "ckpt.partial_save")


def test_knows_the_page_only(tmp_path: Path) -> None:
    """It imports NumPy, xxhash and the standard library, nothing of ours or of JAX."""
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
        )
    }
    assert imported - sys.stdlib_module_names == {"numpy", "xxhash"}
    saved(tmp_path / "ckpt")
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "ckpt.partial_save"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "large float64[100, 77]\n" in done.stdout
    assert "text 'naïve'\n" in done.stdout


def test_example_of_the_page_is_what_such_a_save_writes(tmp_path: Path) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    shown = json.loads(block)
    fp.save(tmp_path / "ckpt", {"w": jnp.ones((2, 2)), "step": 7})
    (file,) = (tmp_path / "ckpt.partial_save").glob("state/*/part.json")
    moment = json.loads(file.read_bytes())["table"]["time_ns"]
    body = json.dumps(shown["table"], separators=(",", ":")).encode()
    assert second_reader.digest_of(body) == shown["xxh3_128"]
    body = body.replace(str(shown["table"]["time_ns"]).encode(), str(moment).encode())
    body = body.replace(b"cpu:0", str(jax.devices()[0]).encode())  # JAX 0.8: TFRT_CPU_0
    digest = second_reader.digest_of(body).encode()
    assert file.read_bytes() == b'{"xxh3_128":"' + digest + b'","table":' + body + b"}\n"
