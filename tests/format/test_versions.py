"""Checkpoints and sessions of every version of the format are read, finalized and verified.

`data/version_2` and `data/version_3` were written by the package when that was its version.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import trees

import flax_partial as fp
from flax_partial.errors import CorruptCheckpointError
from flax_partial.format.digests import digest
from flax_partial.format.tables import decode_part, encode_part

VERSIONS = (2, 3)
STATE: dict[str, Any] = {
    "w": jnp.arange(4.0),
    "step": 7,
    "old": 2,
    "large": np.arange(600, dtype=np.int32),
    "rows": np.array([[0.0] * 3, [1.0] * 3]),
    "text": "naïve\n",
    "none": None,
    "empty": [{}, ()],
    "packed": np.zeros(900),
    "key": jax.random.key(3),
}
METADATA = {"a": {"b": 1, "c": [2.5]}}


@pytest.fixture(params=VERSIONS, ids="version {}".format)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what a version wrote: `checkpoint`, and the session of another."""
    source = Path(__file__).parent / "data" / f"version_{request.param}"
    return Path(shutil.copytree(source, tmp_path / "copy"))


def assert_read(path: Path) -> None:
    trees.assert_same(fp.load(path, STATE), STATE)
    assert fp.metadata(path).custom_metadata == METADATA
    assert fp.verify(path).bad == {}


def test_checkpoint_is_read(written: Path) -> None:
    assert_read(written / "checkpoint")


def test_session_is_finalized(written: Path) -> None:
    assert fp.status(written / "session").custom_metadata == METADATA
    fp.finalize(written / "session")
    assert_read(written / "session")
    target = {name: STATE[name] for name in ("w", "packed", "text")}
    found = ocp.load(written / "session")
    assert found["text"] == target["text"]
    np.testing.assert_array_equal(found["packed"], target["packed"])


def test_session_goes_on(written: Path) -> None:
    """A part of this version beside those of an older one."""
    fp.save(written / "session", {"new": 1})
    fp.finalize(written / "session")
    trees.assert_same(fp.load(written / "session", STATE | {"new": 1}), STATE | {"new": 1})
    assert fp.verify(written / "session").ok


def test_damage_to_any_file_of_the_root_is_verified(written: Path) -> None:
    path = written / "checkpoint"
    for name in ("contents.json", "manifest.ocdbt", "_METADATA", "_sharding"):
        file = path / "state" / name
        data = file.read_bytes()
        file.write_bytes(data[:-9] + bytes((data[-9] ^ 1,)) + data[-8:])
        assert not fp.verify(path).ok, name
        file.write_bytes(data)
    assert fp.verify(path).ok


def changed(data: bytes, **fields: Any) -> bytes:
    table = json.loads(data)["table"] | fields
    body = json.dumps(table).encode()
    return b'{"xxh3_128":"' + digest(body).encode() + b'","table":' + body + b"}\n"


@pytest.fixture
def part() -> bytes:
    state = Path(__file__).parent / "data" / "version_3" / "session.partial_save" / "state"
    return min(state.glob("part.*/part.json")).read_bytes()


def test_field_of_a_later_version_is_skipped(part: bytes) -> None:
    read = decode_part(part, where="")
    leaves = [leaf | {"hue": [1]} for leaf in json.loads(part)["table"]["leaves"]]
    assert decode_part(changed(part, hue={"a": 1}, leaves=leaves, requires=[]), where="") == read
    assert decode_part(encode_part(read), where="") == read


LATER = {
    "format": ({"format": 4}, "format 4"),
    "feature": ({"requires": ["hue"]}, "requires 'hue'"),
    "kind": ({"leaves": [{"path": ["a"], "keys": "d", "kind": "hue"}]}, "hue"),
    "placeholder with a value": (
        {"leaves": [{"path": ["a"], "keys": "d", "kind": "None", "placeholder": True}]},
        "placeholder",
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_what_must_not_be_skipped_is_refused(part: bytes, name: str) -> None:
    fields, told = LATER[name]
    with pytest.raises(CorruptCheckpointError, match=told):
        decode_part(changed(part, **fields), where="")
