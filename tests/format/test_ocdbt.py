"""Databases as tensorstore reads them, written without it: the same keys, the same values."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st

from flax_partial.format import ocdbt

BLOB = bytes(range(256)) * 64
FILES = ("data", "part.1/data", "part.10/data", "x" * 200)

references = st.builds(
    ocdbt.Reference,
    st.sampled_from(FILES),
    st.integers(0, len(BLOB) // 2),
    st.integers(1, len(BLOB) // 2),
)
entries = st.dictionaries(st.binary(max_size=40), st.binary(max_size=300) | references, min_size=1)


def written(directory: Path, content: dict[bytes, ocdbt.Value]) -> ts.KvStore:
    manifest, data = ocdbt.encode(
        content.items(), data_file="d/nodes", uuid=bytes(16), commit_ns=1_700_000_000 * 10**9
    )
    nodes = {"manifest.ocdbt": manifest, "d/nodes": b"".join(data)}
    files = dict.fromkeys(FILES, BLOB) | nodes
    for name, value in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(value)
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}
    return ts.KvStore.open(spec, context=ts.Context()).result()


def found(database: ts.KvStore) -> dict[bytes, bytes]:
    reads = {key: database.read(key) for key in database.list().result()}
    return {key: read.result().value for key, read in reads.items()}


def expected(content: dict[bytes, ocdbt.Value]) -> dict[bytes, bytes]:
    return {
        key: value if isinstance(value, bytes) else BLOB[value.offset : value.offset + value.length]
        for key, value in content.items()
    }


@given(entries)
def test_tensorstore_reads_what_was_written(content: dict[bytes, ocdbt.Value]) -> None:
    with TemporaryDirectory() as directory:
        assert found(written(Path(directory), content)) == expected(content)


@pytest.mark.parametrize("count", [1, 4096, 4097, 20_000])
@pytest.mark.parametrize("size", [0, 500])
def test_trees_of_any_height_are_read(tmp_path: Path, count: int, size: int) -> None:
    """20,000 values of 500 bytes make some 40 leaf nodes below a root."""
    content: dict[bytes, ocdbt.Value] = {
        f"layer{number}/kernel/c/0".encode(): number.to_bytes(4) + bytes(size)
        for number in range(count)
    }
    database = written(tmp_path, content)
    assert found(database) == content
    assert database.read(b"layer").result().state == "missing"
    low, high = b"layer1/", b"layer10"
    listed = database.list(ts.KvStore.KeyRange(low, high)).result()
    assert set(listed) == {key for key in content if low <= key < high}


def test_same_entries_in_any_order_give_the_same_bytes() -> None:
    content = [(b"b", b"1"), (b"a", ocdbt.Reference("data", 0, 5)), (b"c", b"2")]
    made = [
        ocdbt.encode(order, data_file="d/0", uuid=bytes(16), commit_ns=5)
        for order in (content, content[::-1])
    ]
    assert made[0] == made[1]


def test_flipped_bit_is_an_error_for_tensorstore(tmp_path: Path) -> None:
    content: dict[bytes, ocdbt.Value] = {b"key": b"value", b"other": ocdbt.Reference("data", 3, 9)}
    written(tmp_path, content)
    for name in ("manifest.ocdbt", "d/nodes"):
        whole = (tmp_path / name).read_bytes()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            (tmp_path / name).write_bytes(damaged)
            spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/"}}
            with pytest.raises(ValueError, match=r"(?i)manifest|node|checksum|hex bytes"):
                found(ts.KvStore.open(spec, context=ts.Context()).result())
        (tmp_path / name).write_bytes(whole)
