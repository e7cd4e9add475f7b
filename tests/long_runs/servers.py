"""Real processes against a real S3 server: they race, they are killed, and its answers break.

    python tests/long_runs servers --endpoint http://127.0.0.1:9104 --key key --secret secret
    python tests/long_runs servers --endpoint ... --secs 0 --kills 200 --tiers 0 --faults ''

The bucket is made if there is none. Of these four, each is tried whose option is not 0, or empty:

- for `--secs`, `--processes` save, finalize, abort, remove and load one checkpoint at once, and
  another one after that: what each was told holds;
- `--kills` times, a process that saves and finalizes one checkpoint after the other gets a SIGKILL
  at a random moment: the next one completes what was left, or goes on with it, and finds all that
  had been acknowledged; that one may be killed as it does so;
- `--tiers` times, a run that trains with a local tier, and uploads from there, gets a SIGKILL at a
  random moment, and now and then its machine is lost: the next one restores the newest checkpoint
  that was whole in either tier, and goes on uploading;
- each kind of request breaks in each of the ways that `--faults` lists, by a proxy before the
  server: passing faults are not noticed; of lasting ones the call that fails says so, and harms
  nothing else. A request may take `--limit` seconds: give a slow machine more.

`radosgw.sh` beside this script starts Ceph's gateway. moto, in an environment of its own:

    pip install "moto[server]" && moto_server -H 127.0.0.1 -p 9112
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import tempfile
import time
import traceback
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from http import HTTPStatus
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import trials
from preloaded import server
from s3_server import serving
from store_faults import KINDS, REQUESTS, check_repeated, check_told
from store_races import Call
from stores import another_process
from stub_trainer import begun, end_step

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback
from flax_partial.storage import object_store

ANSWER_SECS = 120.0  # in which a process has to answer: a call that hangs is a fault
EXPECTED = (fp.CheckpointExistsError, fp.IncompleteCheckpointError, fp.NoSessionError)
CHOICES = ("save",) * 5 + ("finalize",) * 2 + ("load",) * 2
DROPS = ("abort", "remove")
GROUPS = 4


def value_of(leaf: str, size: int) -> np.ndarray:
    return np.full(size, sum(leaf.encode()), np.float32)


# --- processes


@contextlib.contextmanager
def started(function: Callable[..., None], *each: tuple[Any, ...]) -> Iterator[list[Connection]]:
    """Starts a process for each tuple of arguments, and ends them; yields pipes to them."""
    pairs = [server().Pipe() for _ in each]
    running = [
        server().Process(target=function, args=(theirs, *arguments), daemon=True)
        for (_, theirs), arguments in zip(pairs, each, strict=True)
    ]
    try:
        for process in running:
            process.start()
        for _, theirs in pairs:
            theirs.close()
        yield [ours for ours, _ in pairs]
    finally:
        for process in running:
            process.kill()
            process.join()


def _answer(pipe: Connection) -> Any:
    assert pipe.poll(ANSWER_SECS), f"no answer within {ANSWER_SECS} s"
    return pipe.recv()


# --- races


def act(url: str, me: int, seed: str) -> list[Call]:
    """Makes some calls; returns what they were told."""
    chance = random.Random(f"{seed} {me}")  # noqa: S311
    calls: list[Call] = []
    kinds = CHOICES + chance.choice(((), (), DROPS))
    for number in range(chance.randint(2, 5)):
        time.sleep(chance.random() * chance.choice((0, 0.01, 0.1)))
        kind, leaf = chance.choice(kinds), f"leaf{me}_{number}"
        state = {leaf: value_of(leaf, chance.choice((3, 2000)))}
        begun, outcome = time.monotonic(), "ok"
        try:
            if kind == "save":
                fp.save(url, state)
            elif kind == "load":
                require_whole(fp.load(url))
            else:
                getattr(fp, kind)(url)
        except (*EXPECTED, fp.CorruptCheckpointError) as error:
            outcome = type(error).__name__
        except BaseException as error:  # noqa: BLE001 - `check` says so
            outcome = repr(error)
        calls.append(Call(begun, time.monotonic(), kind, leaf, outcome))
    return calls


def is_replaced(load: Call, done: list[Call]) -> bool:
    """Whether a checkpoint was removed while it was read, and another one finalized there."""
    kinds = {one.kind for one in done if one.begun < load.ended and one.ended > load.begun}
    return load.outcome == "CorruptCheckpointError" and kinds >= {"remove", "finalize"}


def require_whole(state: dict[str, Any]) -> None:
    for leaf, value in state.items():
        assert (value == value_of(leaf, value.size)).all(), leaf


def check(url: str, calls: list[Call]) -> None:
    """Asserts that what racing processes were told holds; nothing goes on there any more."""
    allowed = {"ok", *(error.__name__ for error in EXPECTED)}
    done = [call for call in calls if call.outcome == "ok"]
    odd = [one for one in calls if one.outcome not in allowed and not is_replaced(one, done)]
    assert not odd, (odd, calls)
    finalized = [call for call in done if call.kind == "finalize"]
    removed = [call for call in done if call.kind == "remove"]
    assert len(finalized) <= 1 + len(removed), calls
    last_drop = max((call.ended for call in done if call.kind in DROPS), default=0.0)
    with contextlib.suppress(*EXPECTED):
        fp.finalize(url)
    try:
        held = fp.load(url)
    except fp.NoSessionError:
        held = {}
    require_whole(held)
    saved = {call.leaf for call in done if call.kind == "save"}
    due = {call.leaf for call in done if call.kind == "save" and call.begun > last_drop}
    assert due <= set(held), ("lost", due - set(held), calls)
    assert set(held) <= saved, ("not acknowledged", set(held) - saved, calls)
    assert held or all(call.begun < last_drop for call in finalized), ("lost", calls)


def _race(pipe: Connection, me: int) -> None:
    while True:
        url, seed = pipe.recv()
        another_process()
        pipe.send(act(url, me, seed))


def races(places: Iterator[str], *, processes: int, secs: float, seed: int) -> list[list[Call]]:
    """Has processes race for some seconds, at one place after the other; checks each race."""
    held: list[list[Call]] = []
    end = 0.0
    with started(_race, *((me,) for me in range(processes))) as pipes:
        while time.monotonic() < end or not held:
            url = next(places)
            for pipe in pipes:
                pipe.send((url, f"{seed} {len(held)}"))
            calls = [call for pipe in pipes for call in _answer(pipe)]
            check(url, calls)
            held.append(calls)
            end = end or time.monotonic() + secs  # from when all have started
    return held


# --- kills


@dataclass
class Ledger:
    """What a process that was killed had acknowledged.

    Attributes:
      step: The checkpoint that it was at.
      saved: The groups of it that were saved.
      is_finalized: Whether it was finalized.
      told: How many acknowledgements there were in all.
    """

    step: int = 1
    saved: set[int] = field(default_factory=set)
    is_finalized: bool = False
    told: int = 0

    def note(self, step: int, what: int | str) -> int | str:
        """Notes an acknowledgement; returns of what."""
        assert what != "broken", step
        self.told += 1
        if step != self.step:
            self.step, self.saved, self.is_finalized = step, set(), False
        if isinstance(what, int):
            self.saved.add(what)
        self.is_finalized = what == "finalized"
        if what == "held":  # and is removed now
            self.step, self.saved = step + 1, set()
        return what


def train(pipe: Connection, url: str, ledger: Ledger, *, completes: bool) -> None:
    """Checks and completes what the one before left, or goes on with it; and then with the next.

    Args:
      pipe: Gets `(step, group)` for each save, `(step, "finalized")`, `(step, "held")`.
      url: Of the run.
      ledger: What the ones before have acknowledged.
      completes: Whether to finalize what is there, rather than to save what lacks.
    """
    try:
        _finish(pipe, f"{fp.StorePath(url) / str(ledger.step)}", ledger, completes=completes)
        for step in itertools.count(ledger.step + 1):
            path = str(fp.StorePath(url) / str(step))
            for group in range(GROUPS):
                fp.save(path, group_of(step, group), replace=True)
                pipe.send((step, group))
            fp.finalize(path)
            pipe.send((step, "finalized"))
    except BaseException:  # noqa: BLE001 - it is raised where it is read
        pipe.send((traceback.format_exc(), "broken"))


def _finish(pipe: Connection, path: str, ledger: Ledger, *, completes: bool) -> None:
    if not completes and not ledger.is_finalized:
        for group in set(range(GROUPS)) - ledger.saved:
            try:
                fp.save(path, group_of(ledger.step, group), replace=True)
            except fp.CheckpointExistsError:  # the one before was finalizing it
                break
            pipe.send((ledger.step, group))
    with contextlib.suppress(fp.CheckpointExistsError):
        try:
            fp.finalize(path)
        except (fp.NoSessionError, fp.IncompleteCheckpointError):
            assert not ledger.saved, f"{path}: {ledger} is lost"
            return
    pipe.send((ledger.step, "finalized"))
    held = fp.load(path)
    require_whole(held)
    lost = {name for group in ledger.saved for name in group_of(ledger.step, group)} - set(held)
    assert not lost, f"{path}: {lost} of {ledger} is lost"
    assert fp.verify(path).ok
    pipe.send((ledger.step, "held"))
    fp.remove(path)


def group_of(step: int, group: int) -> dict[str, Any]:
    """What is saved at once; now and then it is so large that it is sent in pieces."""
    leaf = f"step{step}_group{group}"
    return {leaf: value_of(leaf, 5 << 20 if step % 4 == group == 0 else 2000)}


def kills(url: str, *, count: int, seed: int) -> tuple[Ledger, Counter[str]]:
    """Kills one process after the other, and lets a last one complete what is left.

    Returns:
      What they had acknowledged in the end; and how often a process was killed after what.
    """
    chance = random.Random(seed)  # noqa: S311
    ledger, after, pause = Ledger(), Counter[str](), 0.1
    for number in range(count + 1):
        arguments = (url, ledger)
        with started(_train, (*arguments, chance.random() < 0.5)) as (pipe,):
            if number == count:
                while ledger.note(*_answer(pipe)) != "finalized" or ledger.step < 2:
                    pass
                return ledger, after
            what: int | str = "nothing"
            for _ in range(chance.randint(0, 2 * GROUPS)):
                begun = time.monotonic()
                what = ledger.note(*_answer(pipe))
                pause = 0.9 * pause + 0.1 * (time.monotonic() - begun)
            time.sleep(chance.uniform(0, 2 * pause))
        with contextlib.suppress(EOFError):
            while True:
                what = ledger.note(*pipe.recv())
        after["after a save" if isinstance(what, int) else f"after {what}"] += 1
    raise AssertionError


def _train(pipe: Connection, url: str, ledger: Ledger, completes: bool) -> None:  # noqa: FBT001
    train(pipe, url, ledger, completes=completes)


# --- tiers


def train_in_tiers(pipe: Connection, url: str, local: Path, least: int) -> None:
    """Goes on from what it restores, at least from a step; tells each step that it has saved."""
    try:
        callback = PartialCheckpointCallback(
            url, local=local, every_n_train_steps=1, every_n_epochs=None, most_uploads=4
        )
        found = callback.restore()
        first = found[1] if found else 0
        assert first >= least, f"restored {first} where {least} was whole"
        trainer = begun(callback)
        for step in itertools.count(first + 1):
            end_step(callback, trainer, step)
            pipe.send(step)
    except BaseException:  # noqa: BLE001 - it is raised where it is read
        pipe.send(traceback.format_exc())


def machines(run: str, directory: Path, *, count: int, seed: int) -> tuple[Counter[str], int]:
    """Kills one run with a local tier after the other; of each fifth the machine is lost.

    Returns:
      How often what was lost; and the last step in the bucket, once a run could end.
    """
    chance = random.Random(seed)  # noqa: S311
    lost: Counter[str] = Counter()
    for _ in range(count):
        tier = directory / f"machine{lost['machine']}"
        with started(train_in_tiers, (run, tier, newest_of(tier, run))) as (pipe,):
            for _ in range(chance.randint(1, 6)):
                assert isinstance(told := _answer(pipe), int), told
            time.sleep(chance.uniform(0, 0.3))
        lost["process"] += 1
        if chance.random() < 0.2:
            shutil.rmtree(tier)
            lost["machine"] += 1
    tier = directory / f"machine{lost['machine']}"
    least = newest_of(tier, run)
    callback = PartialCheckpointCallback(run, local=tier)
    found = callback.restore()
    last = found[1] if found else 0
    assert last >= least
    callback.on_train_end(begun(callback), None)
    held = fp.steps(run)
    assert max(held, default=0) == last
    for step in held:
        state = fp.load(fp.StorePath(run) / str(step))
        assert (state["params"]["head"]["w"] == step).all()
    return lost, last


def newest_of(tier: Path, run: str) -> int:
    return max([*fp.steps(tier), *fp.steps(run)], default=0)


# --- all of it


def make_bucket(name: str) -> None:
    """Makes a bucket if there is none, at the server that the environment names."""
    from obstore import sign
    from obstore.store import S3Store

    store = S3Store(name, client_options={"allow_http": True})
    url = sign(store, "PUT", "", timedelta(minutes=5))
    request = urllib.request.Request(url, method="PUT")  # noqa: S310
    try:
        urllib.request.urlopen(request).close()  # noqa: S310
    except HTTPError as error:
        if error.code != HTTPStatus.CONFLICT:
            raise


def faults(bucket: str, endpoint: str, kinds: Sequence[str], *, limit_secs: float) -> bool:
    """Breaks each kind of request in each way, for a while and for good; returns whether all held.

    Args:
      bucket: The bucket.
      endpoint: The server's.
      kinds: In which ways.
      limit_secs: For how long a request may take; one that hangs takes longer.
    """
    object_store.PIECE_BYTES = 5 << 20  # the least that S3 takes
    told, tried, held, hang_secs = Counter[str](), 0, 0, limit_secs + 0.5
    with serving(endpoint.partition("//")[2]) as proxy:
        for request, kind in itertools.product(REQUESTS, kinds):
            urls = (f"s3://{bucket}/{uuid.uuid4().hex}?endpoint={proxy.endpoint}" for _ in range(2))
            passing, lasting = urls
            tried += 2
            try:
                fp.store_options(f"s3://{bucket}", timeout_secs=limit_secs, retry_secs=300.0)
                check_repeated(proxy, passing, request, kind, hang_secs=hang_secs)
                held += 1
                fp.store_options(f"s3://{bucket}", timeout_secs=limit_secs, retry_secs=0.2)
                told[check_told(proxy, lasting, request, kind, hang_secs=hang_secs) or "none"] += 1
                held += 1
            except (AssertionError, OSError) as error:
                trials.say(f"BROKEN {request}, {kind}: {type(error).__name__}: {error}")
    trials.say(f"{tried} faults tried, {held} held; what failed by those that last: {dict(told)}")
    return held == tried


def main() -> int:
    chosen = trials.options(
        __doc__ or "",
        endpoint="",
        bucket="flax-partial",
        key="testkey",
        secret="testsecret",  # noqa: S106
        secs=60.0,
        processes=8,
        kills=30,
        tiers=30,
        faults=",".join(KINDS),
        limit=3.0,
        seed=0,
    )
    os.environ |= {
        "AWS_ACCESS_KEY_ID": chosen.key,
        "AWS_SECRET_ACCESS_KEY": chosen.secret,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": chosen.endpoint,
    }
    make_bucket(chosen.bucket)
    base = f"s3://{chosen.bucket}/{uuid.uuid4().hex[:8]}"
    if chosen.secs:
        places = (f"{base}/{number}" for number in range(10**9))
        held = races(places, processes=chosen.processes, secs=chosen.secs, seed=chosen.seed)
        outcomes = Counter((call.kind, call.outcome) for calls in held for call in calls)
        trials.say(f"{len(held)} races of {chosen.processes} processes held: {dict(outcomes)}")
    if chosen.kills:
        ledger, after = kills(f"{base}/killed", count=chosen.kills, seed=chosen.seed)
        trials.say(
            f"{chosen.kills} SIGKILLs held: {dict(after)}; {ledger.told} acknowledgements, "
            f"{ledger.step} checkpoints"
        )
    if chosen.tiers:
        with tempfile.TemporaryDirectory() as directory:
            run = f"{base}/tiers"
            lost, last = machines(run, Path(directory), count=chosen.tiers, seed=chosen.seed)
        trials.say(f"{dict(lost)} lost in the middle of a run: all held; {last} steps")
    kinds = [kind for kind in chosen.faults.split(",") if kind]
    return int(not faults(chosen.bucket, chosen.endpoint, kinds, limit_secs=chosen.limit))


if __name__ == "__main__":
    raise SystemExit(main())
