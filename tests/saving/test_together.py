"""Several states saved by one call: each a part of its own, and JAX is asked for all at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from things import MOST_SECS, until

import flax_partial as fp
from flax_partial.saving import device_copies, snapshot
from flax_partial.sessions import workers

MIB = 1 << 20
MODES = {
    "directly": fp.SaveOptions(durable=False),
    "bounded": fp.SaveOptions(durable=False, max_inflight_bytes=3 * MIB),
    "copied": fp.SaveOptions(durable=False, max_device_bytes=64 * MIB),
    "copied and bounded": fp.SaveOptions(
        durable=False, max_device_bytes=64 * MIB, max_inflight_bytes=3 * MIB
    ),
}


@jax.jit
def slow_sum(x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 100, lambda _, y: jnp.sqrt(y * y) + 1, x)


def layers(count: int) -> list[dict[str, Any]]:
    """Of 1 MiB each and some small leaves, which are still being computed."""
    return [
        {f"layer {n}": {"w": slow_sum(jnp.full(MIB // 4, float(n))), "b": jnp.full(3, n), "n": n}}
        for n in range(count)
    ]


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: layer for state in states for name, layer in state.items()}


@pytest.mark.parametrize("mode", MODES)
def test_each_state_is_a_part_of_its_own_and_survives_deletion(tmp_path: Path, mode: str) -> None:
    options = MODES[mode]
    for name in ("warm", "c"):
        states = layers(8)
        expected = jax.tree.map(np.array, merged(layers(8)))
        said = [{"groups": {f"{number}": True}} for number in range(8)]
        began = time.perf_counter()
        handles = fp.save_each_async(tmp_path / name, states, custom_metadata=said, options=options)
        secs = time.perf_counter() - began
        for leaf in jax.tree.leaves(states):
            if isinstance(leaf, jax.Array):
                leaf.delete()
        reports = [handle.result(MOST_SECS) for handle in handles]
        until(lambda: not workers.compiling.unfinished)
    assert len({report.part for report in reports}) == 8
    assert all(report.budget_secs <= report.blocked_secs for report in reports)
    assert 0 < sum(report.blocked_secs for report in reports) <= secs
    assert [report.leaves for report in reports] == [3] * 8
    assert {report.device_bytes for report in reports} == ({MIB + 12} if "copied" in mode else {0})
    metadata = fp.finalize(tmp_path / "c")
    assert metadata.parts == 8
    assert metadata.custom_metadata == {"groups": {f"{number}": True for number in range(8)}}
    found = fp.load(tmp_path / "c")
    jax.tree.map(np.testing.assert_array_equal, expected, found)


def test_all_are_copied_and_all_are_transferred_by_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    get, transfer = device_copies._programs.get, snapshot._transferred  # noqa: SLF001

    def counted_get(batch: Any) -> Any:
        program = get(batch)

        def run(arrays: Any) -> Any:
            calls.append("copy")
            return program(arrays)

        return program and run

    def counted_transfer(sources: list[Any]) -> list[jax.Array]:
        calls.extend(["transfer"] if sources else [])
        return transfer(sources)

    monkeypatch.setattr(device_copies._programs, "get", counted_get)  # noqa: SLF001
    monkeypatch.setattr(snapshot, "_transferred", counted_transfer)
    monkeypatch.setattr(snapshot, "_taken_on_host", lambda _: False)
    for number, expected in enumerate((["transfer"], ["copy", *["transfer"] * 5])):
        path = tmp_path / f"{number}"
        states = layers(5)  # of which no other test saves as many
        for handle in fp.save_each_async(path, states, options=MODES["copied"]):
            handle.result(MOST_SECS)
        assert calls == expected  # copies leave the device one save after the other
        calls.clear()
        until(lambda: not workers.compiling.unfinished)
        fp.finalize(path)
        trees.assert_whole(path, merged(states))


@pytest.mark.parametrize(
    ("last", "error"),
    [
        pytest.param({"layer 0": 1}, fp.KeyConflictError, id="a conflict among them"),
        pytest.param({"x": object()}, fp.UnsupportedLeafError, id="what cannot be saved"),
        pytest.param({}, fp.EmptyStateError, id="nothing to save"),
    ],
)
def test_nothing_is_saved_where_one_is_wrong(
    tmp_path: Path, last: dict[str, Any], error: type[Exception]
) -> None:
    states = layers(3)
    with pytest.raises(error):
        fp.save_each_async(tmp_path / "c", [*states, last])
    with pytest.raises(fp.NoSessionError):
        fp.status(tmp_path / "c")
    for handle in fp.save_each_async(tmp_path / "c", states):  # nothing is claimed
        handle.result(MOST_SECS)
    fp.finalize(tmp_path / "c")
    trees.assert_whole(tmp_path / "c", merged(states))


def test_metadata_has_to_be_given_for_each(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 custom_metadata for 2 states"):
        fp.save_each_async(tmp_path / "c", layers(2), custom_metadata=[{"a": 1}])
    assert fp.save_each_async(tmp_path / "c", []) == []
