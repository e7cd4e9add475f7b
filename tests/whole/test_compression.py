"""Compressed leaves: how small they are, who reads them, and what damage to them comes to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import orbax_side as side
import pytest
import tensorstore as ts
from orbax.checkpoint.experimental import v1
from safetensors.numpy import load_file
from test_forged import assert_harmless, read_all
from things import stored

import flax_partial as fp
from flax_partial.cli.main import main
from flax_partial.storage import tensorstore_io

if TYPE_CHECKING:
    from pathlib import Path

    from isolated import Isolated

CODECS = ("zstd", "blosc")
WEIGHTS = np.random.default_rng(0).normal(0, 0.02, (512, 512)).astype(np.float32)
BLOSC = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}


def quick(compression: str | None, chunk_bytes: int = 1 << 18) -> fp.SaveOptions:
    return fp.SaveOptions(durable=False, compression=compression, chunk_bytes=chunk_bytes)


def data_of(report: fp.FinalizeReport) -> bytes:
    (data,) = report.path.glob("state/part.*/data")
    return data.read_bytes()


def open_in(database: Path, name: str, **spec: Any) -> ts.TensorStore:
    store = {"driver": "ocdbt", "base": f"file://{database}/", "path": f"{name}/"}
    return ts.open({"driver": "zarr3", "kvstore": store, **spec}).result()


# --- how small


@pytest.mark.parametrize(("dtype", "most"), [(jnp.bfloat16, 0.77), (jnp.float32, 0.89)])
def test_blosc_makes_weights_smaller_than_zstd_does(
    dtype: Any, most: float, tmp_path: Path
) -> None:
    state = {"w": jnp.asarray(WEIGHTS, dtype)}
    sizes = {
        codec: len(data_of(stored(tmp_path / codec, state, options=quick(codec))))
        for codec in CODECS
    }
    assert sizes["blosc"] < most * state["w"].nbytes
    assert sizes["blosc"] < sizes["zstd"]


def test_digests_are_of_what_was_saved_however_it_is_stored(tmp_path: Path) -> None:
    digests = []
    for codec in (None, *CODECS):
        report = stored(tmp_path / str(codec), {"w": WEIGHTS}, options=quick(codec))
        table = json.loads((report.path / "state" / "contents.json").read_bytes())["table"]
        digests.append(table["leaves"][0]["boxes"][0][2])
    assert digests[0] == digests[1] == digests[2]
    assert all(digests[0])


def test_many_boxes_are_encoded_at_a_time_and_come_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorstore_io, "_ENCODING_BYTES", 5_000)  # a few chunks
    state = {str(i): np.full((300 + i, 7), i, np.int32) for i in range(20)} | {
        "none": np.zeros((0, 4)),
        "one": np.float32(3.5),
        "larger than the bound": np.arange(3_000.0),
    }
    for codec in CODECS:
        options = quick(codec, chunk_bytes=1_000)
        path = stored(tmp_path / codec, state, options=options).path
        side.assert_same(fp.load(path), state)


# --- who reads it


def test_tensorstore_reads_blosc_and_says_which(tmp_path: Path) -> None:
    report = stored(tmp_path / "c", {"w": WEIGHTS}, options=quick("blosc"))
    store = open_in(report.path / "state", "w")
    np.testing.assert_array_equal(store.read().result(), WEIGHTS)
    codecs = store.spec(retain_context=False).to_json()["metadata"]["codecs"]
    assert {"name": "blosc", "configuration": {**BLOSC, "typesize": 4}} in codecs


def test_blosc_of_another_writer_is_read(tmp_path: Path) -> None:
    """A checkpoint of Orbax's, of which tensorstore has written an array again, by its blosc."""
    v1.save(tmp_path / "c", {"w": jnp.asarray(WEIGHTS), "b": jnp.ones(3)})
    (manifest,) = (tmp_path / "c").glob("*/manifest.ocdbt")
    codec = {"name": "blosc", "configuration": {**BLOSC, "cname": "zstd", "typesize": 4}}
    metadata = {"shape": WEIGHTS.shape, "data_type": "float32", "codecs": [codec]}
    how = {"create": True, "delete_existing": True, "metadata": metadata}
    store = open_in(manifest.parent, "w", **how)
    store.write(WEIGHTS).result()
    loaded = fp.load(tmp_path / "c")
    np.testing.assert_array_equal(np.asarray(loaded["w"]), WEIGHTS)
    assert fp.verify(tmp_path / "c").ok


def test_the_command_line_verifies_and_exports_blosc(tmp_path: Path) -> None:
    stored(tmp_path / "c", {"w": WEIGHTS}, options=quick("blosc"))
    assert main(["verify", str(tmp_path / "c")]) == 0
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "w.safetensors")]) == 0
    np.testing.assert_array_equal(load_file(tmp_path / "w.safetensors")["w"], WEIGHTS)


# --- damage


def _cut(data: bytearray) -> None:
    del data[len(data) // 2 :]


def _claim(size: int) -> Any:
    return lambda data: data.__setitem__(slice(4, 8), size.to_bytes(4, "little"))


def _flip(at: int) -> Any:
    return lambda data: data.__setitem__(at, data[at] ^ 0x55)


DAMAGE = {
    "claims 4 GiB": _claim((1 << 32) - 1),
    "claims nothing": _claim(0),
    "claims a byte too many": _claim(WEIGHTS.nbytes + 1),
    "another version": _flip(0),
    "other flags": _flip(2),  # of them how it was shuffled
    "another size of elements": _flip(3),
    "other blocks": _flip(8),
    "another length": _flip(12),
    "another first block": _flip(16),
    "other data": _flip(5_000),
    "all zeros": lambda data: data.__setitem__(slice(None), bytes(len(data))),
    "cut short": _cut,
    "a header's beginning": lambda data: data.__delitem__(slice(6, None)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_blosc_is_an_error_and_takes_no_memory(
    name: str, tmp_path: Path, apart: Isolated
) -> None:
    report = stored(tmp_path / "c", {"w": WEIGHTS}, options=quick("blosc", WEIGHTS.nbytes))
    (file,) = report.path.glob("state/part.*/data")
    data = bytearray(file.read_bytes())
    DAMAGE[name](data)
    file.write_bytes(data)
    outcomes = assert_harmless(apart.call(read_all, report.path))
    assert outcomes["load"] == "CorruptCheckpointError"
    assert "'w'" in outcomes["verify"]


# --- what is refused


@pytest.mark.parametrize(
    "compression", ["blosc:9", "Blosc", "lz4", "", 5, True, ["blosc"], {}], ids=repr
)
def test_other_names_and_levels_are_refused_by_what_there_is(compression: Any) -> None:
    with pytest.raises(ValueError, match=r"None, 'zstd' or 'blosc'"):
        fp.SaveOptions(compression=compression)
