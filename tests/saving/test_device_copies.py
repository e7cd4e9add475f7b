"""Snapshots by copies on the devices: right, bounded, given back, and only where there is room.

What fails where a part of it is taken out, as was tried by taking it out:

- the copies (`snapshot.copying_devices` finds no device): 17 of these, among them
  `test_copies_survive_donation_deletion_and_overwriting`, by the bytes that were copied;
- packing (`device_copies._size_of` packs nothing):
  `test_small_leaves_travel_as_one_buffer_to_the_bit`,
  `test_many_small_leaves_are_packed_some_at_a_time`, `test_what_cannot_be_compiled_is_transferred`;
- the device's budget (`DeviceRoom.take` grants all that is asked for): 12, among them
  `test_what_has_no_room_is_transferred_from_where_it_is`,
  `test_by_default_copies_take_what_two_whole_steps_left`, `test_room_is_each_devices_own`;
- the host's budget (`MemoryBudget` grants all that is asked for):
  `test_groups_wait_on_the_device_instead_of_in_the_call`,
  `test_where_neither_has_room_the_call_waits_and_says_so`;
- writing what has arrived (`snapshot.wait_until_computed` waits for all):
  `test_what_has_arrived_is_written_while_the_rest_is_on_its_way`;
- one call of JAX for what is saved together (`job.hand_over` takes one save after the other):
  `test_together.py::test_all_are_copied_and_all_are_transferred_by_one_call`.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from no_memory import no_memory
from things import MOST_SECS, until

import flax_partial as fp
from flax_partial.saving import device_copies, device_room, job, snapshot
from flax_partial.saving.memory_budget import MemoryBudget
from flax_partial.sessions import workers
from flax_partial.storage import direct_io, session_dir

__all__ = ["no_memory"]  # a fixture

MIB = 1 << 20
ON_DEVICE = fp.SaveOptions(durable=False, max_device_bytes=64 * MIB)


@functools.partial(jax.jit, donate_argnums=0)
def double(x: jax.Array) -> jax.Array:
    return x * 2


@jax.jit
def slow_sum(x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 200, lambda _, y: jnp.sqrt(y * y) + 1, x)


def compiled(path: Path, state: Any) -> None:
    """Has what copies such a state compiled, by a save of it."""
    fp.save_async(path, state, options=ON_DEVICE).result(MOST_SECS)
    until(lambda: not workers.compiling.unfinished)
    fp.abort(path)


def assert_nothing_held() -> None:
    assert [job._room.held(device) for device in jax.devices()] == [0] * jax.device_count()  # noqa: SLF001


PLACES = {
    "one": lambda: jax.devices()[1],
    "sharded": lambda: jax.NamedSharding(trees.mesh("x"), jax.P("x")),
    "replicated": lambda: jax.NamedSharding(trees.mesh("x"), jax.P()),
}


@pytest.mark.parametrize("is_ready", [True, False], ids=["ready", "computing"])
@pytest.mark.parametrize("place", PLACES)
def test_copies_survive_donation_deletion_and_overwriting(
    tmp_path: Path, place: str, *, is_ready: bool
) -> None:
    start = jax.device_put(np.zeros(1 << 20, np.float32), PLACES[place]())
    compiled(tmp_path / "warm", {"donated": start, "deleted": start, "overtaken": start})
    donated, deleted, overtaken = slow_sum(start), slow_sum(start + 1), slow_sum(start + 2)
    if is_ready:
        jax.block_until_ready((donated, deleted, overtaken))
    state = {"donated": donated, "deleted": deleted, "overtaken": overtaken}
    handle = fp.save_async(tmp_path / "c", state, options=ON_DEVICE)
    donated = double(donated)
    deleted.delete()
    for _ in range(5):
        overtaken = double(overtaken)
    report = handle.result(MOST_SECS)
    fp.finalize(tmp_path / "c")
    loaded = fp.load(tmp_path / "c", dict.fromkeys(state, start))
    for name, value in (("donated", 200), ("deleted", 201), ("overtaken", 202)):
        assert (np.asarray(loaded[name]) == value).all(), name
    assert report.device_bytes == report.bytes == 3 * start.nbytes
    assert_nothing_held()


# --- packing --------------------------------------------------------------------------------------

# Of each dtype that JAX has without x64, any bits: NaN payloads and -0.0 take part.
ARRAYS = {
    name: jnp.asarray(trees.random_bits(name, (3, 5), seed))
    for seed, name in enumerate(sorted(set(trees.DTYPES) - trees.WIDE))
}
# Bits of the device that NumPy holds otherwise, and numbers that cannot be cast.
TRANSFERRED = {
    **{name: ARRAYS.pop(name) for name in ("complex64", "float4_e2m1fn", "int2", "int4")},
    "large": jnp.arange(100_000.0),
}
PACKED = {
    **ARRAYS,
    "scalar": jnp.int32(7),
    "key": jax.random.key(5),
    "again": jnp.ones((1, 1, 4)),
}
OTHERS = {"empty": jnp.zeros((0, 3)), "numpy": np.arange(4), "number": 3, "text": "t", "none": None}


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many arrays each call has transferred."""
    found: list[int] = []
    transfer = snapshot._transferred  # noqa: SLF001

    def count(sources: list[Any]) -> list[jax.Array]:
        found.append(len(sources))
        return transfer(sources)

    monkeypatch.setattr(snapshot, "_transferred", count)
    return found


def test_small_leaves_travel_as_one_buffer_to_the_bit(tmp_path: Path, transfers: list[int]) -> None:
    state = PACKED | TRANSFERRED | OTHERS
    compiled(tmp_path / "warm", state)
    transfers.clear()
    report = fp.save_async(tmp_path / "c", state, options=ON_DEVICE).result(MOST_SECS)
    assert sorted(filter(None, transfers)) == [1 + len(TRANSFERRED)]  # the buffer is one of them
    assert report.device_bytes == sum(
        leaf.nbytes if hasattr(leaf, "nbytes") else 0
        for leaf in (*PACKED.values(), *TRANSFERRED.values())
    )
    fp.finalize(tmp_path / "c")
    assert fp.verify(tmp_path / "c").ok
    trees.assert_whole(tmp_path / "c", state)
    assert_nothing_held()


def test_numbers_of_less_than_a_byte_keep_no_others_from_being_copied(tmp_path: Path) -> None:
    """What `jax.device_put` makes of them has a layout that no compiled function takes."""
    device = jax.devices()[1]
    state = {
        "int4": jax.device_put(jnp.ones((8, 3), jnp.int4), device),
        "float32": jax.device_put(jnp.ones((8, 3)), device),
        "large": jax.device_put(jnp.arange(100_000.0), device),
    }
    compiled(tmp_path / "warm", state)
    report = fp.save_async(tmp_path / "c", state, options=ON_DEVICE).result(MOST_SECS)
    assert report.device_bytes >= state["float32"].nbytes + state["large"].nbytes
    fp.finalize(tmp_path / "c")
    trees.assert_whole(tmp_path / "c", state)


def test_wide_numbers_of_a_thread_that_has_them_are_copied(tmp_path: Path) -> None:
    with jax.enable_x64(new_val=True):
        state = {"float64": jnp.arange(9.0), "int64": jnp.arange(9), "int32": jnp.int32(7)}
        compiled(tmp_path / "warm", state)
        report = fp.save_async(tmp_path / "c", state, options=ON_DEVICE).result(MOST_SECS)
        assert report.device_bytes == report.bytes == 148
        fp.finalize(tmp_path / "c")
        trees.assert_whole(tmp_path / "c", state)


def test_a_save_that_waits_has_all_arrays_transferred_at_once(
    tmp_path: Path, transfers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a CPU, whose arrays NumPy views, nothing is transferred at all."""
    arrays = PACKED | TRANSFERRED
    fp.save(tmp_path / "cpu", arrays | {"numpy": np.arange(4)})
    place_of = snapshot.place_of
    monkeypatch.setattr(
        snapshot, "place_of", lambda of: dataclasses.replace(place_of(of), is_cpu=False)
    )
    fp.save(tmp_path / "accelerator", arrays | {"numpy": np.arange(4)})
    assert [*filter(None, transfers)] == [len(arrays)]
    for name in ("cpu", "accelerator"):
        fp.finalize(tmp_path / name)
        trees.assert_whole(tmp_path / name, arrays | {"numpy": np.arange(4)})


def test_many_small_leaves_are_packed_some_at_a_time(
    tmp_path: Path, transfers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_copies, "_MOST_ARRAYS", 100)
    state = [jnp.full(3, number, jnp.float32) for number in range(250)]
    compiled(tmp_path / "warm", state)
    transfers.clear()
    fp.save_async(tmp_path / "c", state, options=ON_DEVICE).result(MOST_SECS)
    assert sorted(filter(None, transfers)) == [3]
    fp.finalize(tmp_path / "c")
    trees.assert_whole(tmp_path / "c", state)


def test_each_list_of_shapes_is_compiled_once(tmp_path: Path) -> None:
    compiled(tmp_path / "warm", {"w": jnp.zeros((3, 77))})
    known = len(device_copies._programs._compiled)  # noqa: SLF001
    for number in range(3):
        state = {f"{number}": jnp.full((3, 77), number, jnp.float32)}
        report = fp.save_async(tmp_path / "c", state, options=ON_DEVICE).result(MOST_SECS)
        assert report.device_bytes == report.bytes
    assert len(device_copies._programs._compiled) == known  # noqa: SLF001


def test_no_more_is_compiled_than_so_much_and_what_is_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = device_copies._Programs()  # noqa: SLF001
    monkeypatch.setattr(device_copies, "_programs", programs)
    monkeypatch.setattr(device_copies, "_MOST_PROGRAMS", 2)
    lengths = [5, 6, 7, 8]
    for name in ("first", "again"):
        states = [{f"{length}": jnp.zeros(length)} for length in lengths]
        handles = [fp.save_async(tmp_path / name, state, options=ON_DEVICE) for state in states]
        copied = [handle.result(MOST_SECS).device_bytes for handle in handles]
        until(lambda: not workers.compiling.unfinished)
    assert copied == [20, 24, 0, 0]
    assert len(programs._compiled) == 2  # noqa: SLF001


# --- how much room there is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "copied"),
    [
        pytest.param(0, 0, id="off"),
        pytest.param(2 * MIB - 1, 0, id="too little for any"),
        pytest.param(5 * MIB, 2, id="for two of three"),
        pytest.param(6 * MIB, 3, id="for all"),
        pytest.param(None, 0, id="by default, where the platform tells nothing"),
    ],
)
def test_what_has_no_room_is_transferred_from_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, copied: int
) -> None:
    monkeypatch.setattr(device_copies, "_MOST_BYTES", 2 * MIB)
    state = {name: slow_sum(jnp.full(MIB // 2, float(ord(name)))) for name in "abc"}
    compiled(tmp_path / "warm", state)
    options = fp.SaveOptions(durable=False, max_device_bytes=limit)
    handle = fp.save_async(tmp_path / "c", state, options=options)
    for value in state.values():
        double(value)
    assert handle.result(MOST_SECS).device_bytes == copied * 2 * MIB
    fp.finalize(tmp_path / "c")
    loaded = fp.load(tmp_path / "c")
    assert [float(loaded[name][0]) for name in "abc"] == [ord(name) + 200.0 for name in "abc"]
    assert_nothing_held()


def test_out_of_memory_on_the_device_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: device_room.DeviceRoom
) -> None:
    tried = []

    def fail(_: list[jax.Array]) -> list[jax.Array]:
        tried.append(1)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(job, "_room", room)
    monkeypatch.setattr(device_copies._programs, "get", lambda _: fail)  # noqa: SLF001
    state = {"w": jnp.arange(1000.0), "v": [jnp.ones(3), jnp.ones(4)]}
    report = fp.save_async(tmp_path / "c", state, options=ON_DEVICE).result(MOST_SECS)
    assert report.device_bytes == 0
    fp.finalize(tmp_path / "c")
    trees.assert_whole(tmp_path / "c", state)
    fp.save_async(tmp_path / "d", state, options=ON_DEVICE).result(MOST_SECS)
    assert tried == [1]  # an allocator may look for memory for seconds before it says so
    assert_nothing_held()


def test_out_of_memory_that_is_reported_late_falls_back_to_arrays_that_live(
    tmp_path: Path, no_memory: threading.Event
) -> None:
    no_memory.set()
    state = {"large": jnp.arange(100_000.0), **PACKED, "int4": jnp.ones(7, jnp.int4)}
    first = fp.save_async(tmp_path / "c", state, options=ON_DEVICE).result(MOST_SECS)
    assert first.device_bytes > 0  # so it was tried
    fp.finalize(tmp_path / "c")
    trees.assert_whole(tmp_path / "c", state)
    again = fp.save_async(tmp_path / "d", state, options=ON_DEVICE).result(MOST_SECS)
    assert again.device_bytes == 0
    assert_nothing_held()


def test_out_of_memory_that_is_reported_after_the_donation_fails_that_save_alone(
    tmp_path: Path, no_memory: threading.Event
) -> None:
    w = jnp.arange(100_000.0)
    failing = fp.save_async(tmp_path / "c", {"w": w}, options=ON_DEVICE)
    w.delete()
    no_memory.set()
    with pytest.raises(fp.DeviceMemoryError, match="had no memory for a copy of 400000 bytes"):
        failing.result(MOST_SECS)
    saved = {"v": jnp.arange(100_000.0)}
    value = saved["v"]
    again = fp.save_async(tmp_path / "c", saved, options=ON_DEVICE)
    del saved
    double(value)
    assert again.result(MOST_SECS).device_bytes == 0
    fp.finalize(tmp_path / "c")
    assert (fp.load(tmp_path / "c")["v"] == np.arange(100_000.0)).all()
    assert_nothing_held()


class Arriving:
    """Stands in for memory on the host to which a transfer is on its way, until it is let through.

    Where it fails, what was on the device is read.
    """

    def __init__(self, array: jax.Array, arrives: threading.Event, *, fails: bool = False) -> None:
        self.array, self.arrives, self.fails = array, arrives, fails
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes

    def is_ready(self) -> bool:
        return self.arrives.is_set()

    def block_until_ready(self) -> None:
        assert self.arrives.wait(MOST_SECS)
        if self.fails:
            raise jax.errors.JaxRuntimeError("INTERNAL: no luck")

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        self.block_until_ready()
        return np.asarray(self.array)


@pytest.fixture
def appended(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The first number of each leaf that is written into a data file."""
    found: list[float] = []
    append = direct_io.NewFile.append

    def note(self: Any, data: np.ndarray) -> int:
        found.append(float(data.view(np.float32)[0]))
        return append(self, data)

    monkeypatch.setattr(direct_io.NewFile, "append", note)
    return found


@pytest.mark.parametrize(
    ("limit", "fails"),
    [
        pytest.param(64 * MIB, False, id="copied"),
        pytest.param(64 * MIB, True, id="copied, and one transfer fails"),
        pytest.param(0, False, id="directly"),
    ],
)
def test_what_has_arrived_is_written_while_the_rest_is_on_its_way(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    appended: list[float],
    limit: int,
    *,
    fails: bool,
) -> None:
    state = {name: jnp.full(100_000, float(number)) for number, name in enumerate("abc")}
    compiled(tmp_path / "warm", state)
    appended.clear()
    arrives = [threading.Event() for _ in state]
    arrives[0].set()
    transfer = snapshot._transferred  # noqa: SLF001

    def transferred(sources: list[Any]) -> list[Any]:
        arrays = transfer(sources)
        return [
            Arriving(array, event, fails=fails and event is arrives[-1])
            for array, event in zip(arrays, arrives, strict=False)
        ]

    monkeypatch.setattr(snapshot, "_transferred", transferred)
    monkeypatch.setattr(snapshot, "_taken_on_host", lambda _: False)
    options = fp.SaveOptions(durable=False, checksum=False, max_device_bytes=limit)
    handle = fp.save_async(tmp_path / "c", state, options=options)
    for number, event in enumerate(arrives):
        event.set()
        until(lambda: len(appended) > number)  # noqa: B023 - called at once
        assert appended == [0.0, 1.0, 2.0][: number + 1]
    report = handle.result(MOST_SECS)
    times = report.times
    assert times.ready_at <= times.copied_at <= times.written_at
    fp.finalize(tmp_path / "c")
    trees.assert_whole(tmp_path / "c", state)
    assert_nothing_held()


class Plain:
    """Stands in for a sharding on one device of a platform that has one kind of memory."""

    platform, memory_kind = "METAL", None

    @property
    def device_set(self) -> set[Any]:
        return {self}

    def addressable_memories(self) -> list[Any]:
        return []

    def default_memory(self) -> Any:
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no default memory")


def test_no_copies_are_made_where_a_platform_has_one_kind_of_memory() -> None:
    sharding: Any = Plain()
    assert not device_copies.place_of(sharding).can_copy


def test_what_cannot_be_compiled_is_transferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_copies, "_can_be_packed", lambda _: True)  # complex numbers, too
    state = [jnp.full(3, number, jnp.complex64) for number in range(4)]
    for name in ("first", "second"):
        compiled(tmp_path / "warm", state)
        report = fp.save_async(tmp_path / name, state, options=ON_DEVICE).result(MOST_SECS)
        assert report.device_bytes == 0
        fp.finalize(tmp_path / name)
        trees.assert_whole(tmp_path / name, state)


class Memory:
    """Stands in for a device that tells about its memory."""

    def __init__(self, limit: int | None = 1600) -> None:
        self.limit = limit
        self.peak = 0

    def memory_stats(self) -> dict[str, int] | None:
        if self.limit is None:
            return None
        return {"bytes_limit": self.limit, "peak_bytes_in_use": self.peak, "bytes_in_use": 0}


class Something:
    """Can be referred to weakly."""


def train(room: device_room.DeviceRoom, device: Memory, steps: int) -> None:
    """Saves a leaf before each step, and after the last."""
    for _ in range(steps + 1):
        session, array = Something(), Something()
        room.note_save(device, "leaf", session=session, arrays=[array])


@pytest.fixture
def room() -> device_room.DeviceRoom:
    return device_room.DeviceRoom()


def most(room: device_room.DeviceRoom, device: Memory, *, owner: str = "trial") -> int:
    """The largest size that is granted at once, found by halving."""
    low, high = 0, 2000
    while low < high:
        middle = (low + high + 1) // 2
        if room.take([(owner, middle)], device, most=room.most(device, limit=None)):
            room.give_back(owner, device, middle)
            low = middle
        else:
            high = middle - 1
    return low


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_by_default_copies_take_what_two_whole_steps_left(
    room: device_room.DeviceRoom, steps: int
) -> None:
    device = Memory()
    device.peak = 700
    train(room, device, steps)
    assert most(room, device) == (1600 - 700 - 100 if steps >= 2 else 0)


def test_saves_of_one_array_or_into_one_checkpoint_tell_of_no_step(
    room: device_room.DeviceRoom,
) -> None:
    device, session, array = Memory(), Something(), Something()
    others = [Something() for _ in range(8)]
    for other in others:
        room.note_save(device, "leaf", session=other, arrays=[array])
        room.note_save(device, "second leaf", session=session, arrays=[other])
        room.note_save(device, other, session=other, arrays=[other])
    assert most(room, device) == 0


def test_steps_are_seen_where_the_first_leaves_are_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: device_room.DeviceRoom
) -> None:
    monkeypatch.setattr(job, "_room", room)
    monkeypatch.setattr(snapshot, "may_have_room", lambda *_, **__: True)
    frozen, device = jnp.arange(4.0), jax.devices()[0]
    for step in range(3):
        assert not room.has_seen_steps(device)
        fp.save_async(tmp_path / f"{step}", {"base": frozen, "lora": frozen + step}).result(
            MOST_SECS
        )
    assert room.has_seen_steps(device)


class Silent(Memory):
    """One whose platform does not say all of it."""

    def __init__(self, told: dict[str, int | None] | None) -> None:
        super().__init__()
        self.told = told

    def memory_stats(self) -> Any:
        if self.told is None:
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: GetAllocatorStats is not supported")
        return self.told


@pytest.mark.parametrize(
    "device",
    [
        Memory(None),
        Silent({}),
        Silent({"bytes_limit": 1600}),
        Silent({"bytes_limit": 1600, "peak_bytes_in_use": None}),
        Silent({"bytes_limit": None, "peak_bytes_in_use": 700}),
        Silent(None),
    ],
    ids=["nothing", "empty", "no peak", "peak is None", "limit is None", "raises"],
)
def test_by_default_no_copies_are_made_where_the_device_tells_nothing(
    room: device_room.DeviceRoom, device: Memory
) -> None:
    train(room, device, 5)
    assert most(room, device) == 0
    assert not device_room.may_have_room(device, limit=None)
    assert device_room.may_have_room(device, limit=1)
    assert not device_room.may_have_room(Memory(), limit=0)


def test_copies_that_raise_the_peak_themselves_take_no_room_away(
    room: device_room.DeviceRoom,
) -> None:
    device = Memory()
    device.peak = 700
    train(room, device, 2)
    assert room.take([("a", 500)], device, most=room.most(device, limit=None))
    device.peak = 1200  # training and the copy at once
    assert most(room, device, owner="a") == 300
    room.release("a")
    assert most(room, device) == 800


def test_a_step_that_needs_more_than_any_before_takes_the_room(
    room: device_room.DeviceRoom,
) -> None:
    device = Memory()
    device.peak = 700
    train(room, device, 2)
    assert most(room, device) == 800
    device.peak = 1550
    assert most(room, device) == 0


def test_a_larger_step_beside_few_copies_is_not_taken_for_many_copies(
    room: device_room.DeviceRoom,
) -> None:
    device = Memory()
    device.peak = 700
    train(room, device, 2)
    assert room.take([("a", 800)], device, most=room.most(device, limit=None))
    device.peak = 1200  # most of these copies are gone when training takes its most
    assert most(room, device, owner="a") == 0
    room.release("a")
    assert room.take([("b", 100)], device, most=room.most(device, limit=None))
    device.peak = 1500  # a step that takes 1,400, which the first copies would have failed
    assert most(room, device) == 0


def test_room_is_each_devices_own(room: device_room.DeviceRoom) -> None:
    first, second = Memory(), Memory()
    assert room.take([("a", 10)], first, most=10)
    assert not room.take([("b", 1)], first, most=10)
    assert room.take([("b", 10)], second, most=10)
    room.give_back("a", first, 4)
    assert room.take([("b", 4)], first, most=10)
    room.release("b")
    assert (room.held(first), room.held(second)) == (6, 0)
    room.give_back("b", first, 4)  # after its release
    assert room.held(first) == 6


# --- budgets that do not stop training ------------------------------------------------------------

LAYER = jnp.zeros(MIB // 4)  # of 1 MiB


def layers(count: int) -> list[dict[str, jax.Array]]:
    return [{f"{number}": jnp.full_like(LAYER, number)} for number in range(count)]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, nothing is committed."""
    opened, commit = threading.Event(), session_dir.commit_part

    def commit_at_gate(directory: Path, table: bytes, **options: Any) -> None:
        assert opened.wait(MOST_SECS)
        commit(directory, table, **options)

    monkeypatch.setattr(session_dir, "commit_part", commit_at_gate)
    return opened


def test_groups_wait_on_the_device_instead_of_in_the_call(
    tmp_path: Path, gate: threading.Event
) -> None:
    """The calls return while nothing can be written, though the host has room for two layers."""
    gate.set()
    compiled(tmp_path / "warm", {"0": LAYER})
    gate.clear()
    options = fp.SaveOptions(durable=False, max_inflight_bytes=2 * MIB, max_device_bytes=8 * MIB)
    states = layers(10)
    handles = [fp.save_async(tmp_path / "c", state, options=options) for state in states[:8]]
    for state in states[:8]:
        for array in state.values():
            array.delete()
    budget, device = job._budget, jax.devices()[0]  # noqa: SLF001
    until(lambda: job._room.held(device) <= 6 * MIB)  # noqa: SLF001 - two are on the host
    assert budget._total == 2 * MIB  # noqa: SLF001
    assert not any(handle.done() for handle in handles)
    gate.set()
    reports = [handle.result(MOST_SECS) for handle in handles]
    assert [report.device_bytes for report in reports] == [MIB] * 8
    assert budget._total == 0  # noqa: SLF001
    fp.finalize(tmp_path / "c")
    assert [float(fp.load(tmp_path / "c")[f"{number}"][5]) for number in range(8)] == [*range(8)]
    assert_nothing_held()


def test_where_neither_has_room_the_call_waits_and_says_so(
    tmp_path: Path, gate: threading.Event
) -> None:
    """Behind those that wait on the device: or each could have what the other waits for."""
    gate.set()
    compiled(tmp_path / "warm", {"0": LAYER})
    gate.clear()
    options = fp.SaveOptions(durable=False, max_inflight_bytes=MIB, max_device_bytes=2 * MIB)
    states = layers(6)
    done: list[fp.SaveHandle] = []

    def save_all() -> None:
        done.extend(fp.save_async(tmp_path / "c", state, options=options) for state in states)

    caller = threading.Thread(target=save_all)
    caller.start()
    until(lambda: len(job._budget._waiting) >= 2)  # noqa: SLF001
    assert caller.is_alive()
    gate.set()
    caller.join(MOST_SECS)
    reports = [handle.result(MOST_SECS) for handle in done]
    assert sum(report.device_bytes for report in reports) < 6 * MIB
    assert any(report.budget_secs > 0 for report in reports if not report.device_bytes)
    fp.finalize(tmp_path / "c")
    trees.assert_whole(
        tmp_path / "c", {key: value for state in states for key, value in state.items()}
    )


def test_saves_of_several_threads_that_all_hold_some_do_not_wait_for_each_other() -> None:
    """Each holds what was not copied on a device, and waits for room for its copies."""
    budget, granted = MemoryBudget(), list[str]()
    for name in "abc":
        assert budget.acquire(name, 1, limit=4) >= 0
    for name in "abc":
        budget.request(name, 3, limit=4, granted=lambda name=name: granted.append(name))  # type: ignore[misc]
    for done in "abc":
        assert granted[-1] == done
        budget.release(done, limit=4)
    assert granted == ["a", "b", "c"]
    assert budget._total == 0  # noqa: SLF001


def test_a_transfer_that_fails_is_tried_again_as_the_save_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails again there is the save's error, as that of a computation that failed."""
    state = {"w": jnp.arange(1000.0), "v": [jnp.ones(3), jnp.ones(4)]}
    compiled(tmp_path / "warm", state)
    transfer = snapshot._transferred  # noqa: SLF001

    def fail(sources: list[Any]) -> list[jax.Array]:
        if sources:
            raise jax.errors.JaxRuntimeError("INTERNAL: no luck")
        return transfer(sources)

    monkeypatch.setattr(snapshot, "_transferred", fail)
    report = fp.save_async(tmp_path / "c", state, options=ON_DEVICE).result(MOST_SECS)
    assert report.device_bytes == report.bytes
    fp.finalize(tmp_path / "c")
    trees.assert_whole(tmp_path / "c", state)
    assert_nothing_held()


@pytest.mark.timeout(4 * MOST_SECS)
def test_a_process_that_ends_at_once_has_moved_and_written_everything(tmp_path: Path) -> None:
    script = f"""
        import time
        import jax.numpy as jnp
        import flax_partial as fp
        from flax_partial.sessions import workers
        options = fp.SaveOptions(
            durable=False, max_inflight_bytes=1 << 20, max_device_bytes=1 << 30)
        for n in range(20):
            state = {{f"{{n}}": jnp.full(1 << 18, n, jnp.float32)}}
            handle = fp.save_async({str(tmp_path / "c")!r}, state, options=options)
            if n == 0:
                handle.result()
                while workers.compiling.unfinished:
                    time.sleep(0.01)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=3 * MOST_SECS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    fp.finalize(tmp_path / "c")
    assert [float(fp.load(tmp_path / "c")[f"{n}"][7]) for n in range(20)] == [*range(20)]


@pytest.mark.parametrize(
    ("given", "message"), [(-1, "0 or more"), (1.5, "0 or more"), (True, "0 or more")]
)
def test_wrong_limits_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"max_device_bytes.*{message}"):
        fp.SaveOptions(max_device_bytes=given)
