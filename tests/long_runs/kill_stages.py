"""Kills one of several real processes at a random moment, many times; nothing may be lost.

    python tests/long_runs kill_stages --trials 100 --seed 0

In a trial some processes train under `jax.distributed`, each a stage of its own, and save every
step with the callback. One of them gets a SIGKILL while it streams, once it has handed over all,
or while the checkpoint is finalized. Then:

- the others raise, within the timeout, an error that names it; where it was the one that JAX's
  coordination service lives in, JAX ends them within milliseconds, often before they can say so,
  so that in half of the trials the service lives in a process apart;
- a new job, of the same or another number of processes, recovers: what was complete is finalized,
  the rest is dropped; all its processes restore the same step, never an older one than had been
  finalized, with every bit as it was saved; and it goes on to save.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import trials
from cluster import free_port
from preloaded import started
from things import trainer as make_trainer

from flax_partial.distributed import jax_service as coordination

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerProcess

LAYERS = 12
STEPS = 4
TIMEOUT_SECS = 1.0
# The timeout, the other processes' slack, as long again if it had begun to act, and a slow machine.
MOST_SECS = 2 * TIMEOUT_SECS + 1.0 + 4.0
PHASES = ("streaming", "handed over", "finalizing")


@dataclass(frozen=True)
class Plan:
    """One trial: who is killed, when; and how many processes go on."""

    processes: int
    victim: int
    phase: str
    step: int
    delay_secs: float
    is_service_apart: bool
    processes_after: int

    @classmethod
    def drawn(cls, seed: int) -> Plan:
        """Draws everything from a seed."""
        draw = random.Random(seed)  # noqa: S311 - of trials, not of secrets
        processes = draw.choice((2, 3, 4))
        return cls(
            processes=processes,
            victim=draw.randrange(processes),
            phase=draw.choice(PHASES),
            step=draw.randrange(2, STEPS + 1),
            delay_secs=draw.uniform(0, 0.03),
            is_service_apart=draw.random() < 0.5,
            processes_after=draw.choice((1, 2, 3, 4)),
        )


# In the processes.


def layer(number: int, step: int) -> dict[str, np.ndarray]:
    """The parameters of a layer after a step."""
    random = np.random.default_rng((number, step))
    return {"kernel": random.random((64, 64), np.float32), "bias": random.random(64, np.float32)}


def stage_of(index: int, count: int) -> range:
    return range(LAYERS * index // count, LAYERS * (index + 1) // count)


def _connect(port: int, index: int, count: int, *, is_service_apart: bool) -> None:
    import jax

    address = f"127.0.0.1:{port}"
    bind = "127.0.0.1:0" if is_service_apart else address
    jax.distributed.initialize(address, count, index, coordinator_bind_address=bind)


def serve(port: int, count: int, ready: Connection) -> None:
    """Runs JAX's coordination service in this process, apart from those that train."""
    with coordination.serving(f"127.0.0.1:{port}", count):
        ready.send(None)
        with contextlib.suppress(EOFError):
            ready.recv()


def train(  # noqa: PLR0917 - what a process is started with
    directory: Path, port: int, index: int, count: int, plan: Plan | None, answer: Connection
) -> None:
    """Trains a stage from the newest checkpoint on; answers how it ended."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if count > 1:
        _connect(port, index, count, is_service_apart=plan is not None and plan.is_service_apart)
    victim_plan = plan if plan is not None and plan.victim == index else None
    try:
        answer.send(("ended", *_train(directory, index, count, victim_plan, answer)))
    except Exception as error:  # noqa: BLE001 - the trial judges it
        answer.send(("raised", type(error).__name__, str(error)))
    with contextlib.suppress(EOFError):
        answer.recv()  # with the first process JAX's service would go, and with that all others
    os._exit(0)


def _train(
    directory: Path, index: int, count: int, plan: Plan | None, answer: Connection
) -> tuple[int, int]:
    from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

    numbers = stage_of(index, count)
    callback = PartialCheckpointCallback(
        directory,
        every_n_epochs=None,
        every_n_train_steps=1,
        state_fn=lambda trainer, _: {"progress": {"step": trainer.global_step}},
        finalizer=FinalizeHook(timeout_secs=TIMEOUT_SECS),
    )
    trainer = make_trainer(is_last_batch=False)
    callback.setup(trainer, None, "fit")
    callback.on_fit_start(trainer, None)
    restored = _restore(callback, numbers)
    trainer.global_step = restored
    callback.on_train_start(trainer, None)
    answer.send(("restored", restored))
    for step in range(restored + 1, max(restored + 1, STEPS) + 1):
        callback.on_train_batch_start(trainer, None, None, step)
        _arm(plan, "streaming", step)
        for number in reversed(numbers):
            callback.on_layer_ready(trainer, ("blocks", str(number)), layer(number, step))
        trainer.global_step = step
        _arm(plan, "handed over", step)
        callback.on_train_batch_end(trainer, None, None, None, step)
        _arm(plan, "finalizing", step)
        time.sleep(0.01)
        answer.send(("finalized", callback.reports[-1].step if callback.reports else 0))
    callback.on_train_end(trainer, None)
    callback.teardown(trainer, None, "fit")
    return restored, callback.reports[-1].step


def _arm(plan: Plan | None, phase: str, step: int) -> None:
    if plan is None or (plan.phase, plan.step) != (phase, step):
        return
    delay_secs = plan.delay_secs * (2 if phase == "finalizing" else 1)
    timer = threading.Timer(delay_secs, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    if phase == "handed over":  # it never comes to the end of the step
        time.sleep(60)


def _restore(callback: Any, numbers: range) -> int:
    empty = {str(number): layer(number, 0) for number in numbers}
    target = {"params": {"blocks": empty}, "progress": {"step": 0}}
    restored = callback.restore(target, partial=True)
    if restored is None:
        return 0
    state, step = restored
    assert state["progress"]["step"] == step
    for number in numbers:
        for name, value in layer(number, step).items():
            assert np.array_equal(state["params"]["blocks"][str(number)][name], value)
    return int(step)


# The trial.


class Job:
    """The processes of one job, and what they answered."""

    def __init__(self, directory: Path, count: int, plan: Plan | None) -> None:
        self.said: dict[int, list[tuple[Any, ...]]] = {index: [] for index in range(count)}
        self._service: tuple[ForkServerProcess, Connection] | None = None
        port = free_port()
        if plan is not None and plan.is_service_apart:
            self._service = started(serve, port, count)
            self._service[1].recv()
        self.processes = [started(train, directory, port, i, count, plan) for i in range(count)]

    def listen(self, index: int, deadline: float) -> int | None:
        """Receives a process's answers to its end; returns its exit status, None if it did not end.

        One that has answered waits until all have; it counts as ended.
        """
        process, pipe = self.processes[index]
        with contextlib.suppress(EOFError, ConnectionResetError):
            while pipe.poll(max(deadline - time.monotonic(), 0)):
                self.said[index].append(pipe.recv())
                if self.said[index][-1][0] in {"ended", "raised"}:
                    return 0
        process.join(max(deadline - time.monotonic(), 0.1))
        return process.exitcode

    def end(self) -> None:
        """Ends what still runs."""
        for process, pipe in [*self.processes, *([self._service] if self._service else [])]:
            process.kill()
            process.join()
            pipe.close()

    def heard(self, kind: str) -> list[Any]:
        """What all processes answered of one kind."""
        return [one[1] for answers in self.said.values() for one in answers if one[0] == kind]


def run_trial(plan: Plan, directory: Path) -> str:
    """Runs one trial, and raises AssertionError if anything is not as it should be.

    Returns:
      What the others saw of it, for the tally.
    """
    job = Job(directory, plan.processes, plan)
    try:
        killed = job.listen(plan.victim, time.monotonic() + 60)
        has_ended = killed == 0 and job.said[plan.victim][-1][::2] == ("ended", STEPS)  # before it
        assert killed == -signal.SIGKILL or has_ended, (killed, job.said)
        deadline = time.monotonic() + MOST_SECS
        others = [index for index in range(plan.processes) if index != plan.victim]
        outcomes = {_judged(plan, job, index, deadline) for index in others}
    finally:
        job.end()
    newest = max(job.heard("finalized"), default=0)
    complete = _complete_steps(directory, plan)
    after = Job(directory, plan.processes_after, None)
    try:
        statuses = [after.listen(i, time.monotonic() + 60) for i in range(plan.processes_after)]
        assert statuses == [0] * plan.processes_after, (statuses, after.said)
    finally:
        after.end()
    restored = set(after.heard("restored"))
    assert len(after.heard("ended")) == plan.processes_after, after.said
    assert len(restored) == 1, after.said
    assert restored.pop() == max([newest, *complete]), (after.said, newest, complete)
    assert not list(directory.glob("*.partial_save"))
    return " and ".join(sorted(outcomes))


def _judged(plan: Plan, job: Job, index: int, deadline: float) -> str:
    """Returns what another process saw; asserts that it is one of the allowed outcomes."""
    status = job.listen(index, deadline)
    said = job.said[index]
    assert status is not None, f"process {index} hangs: {said}"
    if status == -signal.SIGABRT:
        assert (plan.victim, plan.is_service_apart) == (0, False), said
        return "JAX ended them"
    assert status == 0, (status, said)
    if said[-1][0] == "ended":  # the kill came after all that the others needed of it
        assert said[-1][2] == STEPS, said
        return "all was done"
    _, kind, text = said[-1]
    assert kind == "IncompleteCheckpointError", said
    names = (f"[{plan.victim}]", f"Process {plan.victim} ", f"process {plan.victim},")
    assert any(name in text for name in names), said
    return "they named it"


def _complete_steps(directory: Path, plan: Plan) -> list[int]:
    """Steps whose every part is there, finalized or not, by the tables of contents alone."""
    steps = []
    for path in directory.glob("*"):
        parts = collections.Counter(
            json.loads(table.read_text())["table"]["process"]
            for table in path.glob("state/part.*/part.json")
        )
        wanted = {i: 1 + len(stage_of(i, plan.processes)) for i in range(plan.processes)}
        if parts == wanted:
            steps.append(int(path.name.removesuffix(".partial_save")))
    return steps


def trial(seed: int) -> tuple[str, list[str]]:
    """Runs the trial of a seed; what it wrote stays where it fails."""
    plan = Plan.drawn(seed)
    directory = Path(tempfile.mkdtemp(prefix="kill_stages."))
    try:
        outcome = run_trial(plan, directory)
    except AssertionError as error:
        return plan.phase, [f"{plan}, {directory}: {error!r}"]
    shutil.rmtree(directory)
    return f"{plan.phase}:{outcome}".replace(" ", "-"), []


if __name__ == "__main__":
    sys.exit(trials.run(__doc__, lambda _: trial, trials=100))
