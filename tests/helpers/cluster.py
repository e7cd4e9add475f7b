"""Real processes that a test directs: each does one call after another, and returns the outcome.

With `jax.distributed` they form one job, on a free port of 127.0.0.1; without, they share nothing
but directories. A process that does not answer in time fails the test, with what it had printed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("cluster_worker.py")
ANSWER_SECS = 60.0
START_SECS = 100.0
END_SECS = 20.0


class Process:
    """One process, and a thread that hands it calls and takes its answers, in order."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.was_killed = False
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, WORKER, *arguments],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        self._receiver = ThreadPoolExecutor(1)  # answers come in the order of the calls

    def call(self, name: str, *arguments: Any, **options: Any) -> Future[Any]:
        """Has the process call a function of the worker; the future has what it returned."""
        self._send((name, arguments, options))
        return self._receiver.submit(self._receive)

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: the answer will report it
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        try:
            returned, error = pickle.load(self._process.stdout)  # noqa: S301 - our own worker
        except (EOFError, pickle.UnpicklingError):
            raise AssertionError(f"the process ended:\n{self.printed()}") from None
        if error is not None:
            raise error
        return returned

    def printed(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def wait(self, secs: float) -> int:
        return self._process.wait(secs)

    def kill(self) -> None:
        """Ends it as a power switch would."""
        self.was_killed = True
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal: SIGTERM as a scheduler does; SIGSTOP as if its machine had gone."""
        self._process.send_signal(number)

    def ask_to_end(self) -> None:
        """Lets it end after its last call."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self) -> None:
        """Kills it, if it lives, and closes its pipes."""
        self.ask_to_end()
        self.kill()
        assert self._process.stdout is not None
        self._receiver.shutdown()
        self._process.stdout.close()


class Cluster:
    """Several processes; `call` is for all of them at once."""

    def __init__(self, processes: list[Process]) -> None:
        self.processes = processes

    def start(
        self, name: str, *arguments: Any, on: Iterable[int] | None = None, **options: Any
    ) -> dict[int, Future[Any]]:
        """Has processes call a function, each for itself, and waits for none."""
        chosen = range(len(self.processes)) if on is None else on
        return {i: self.processes[i].call(name, *arguments, **options) for i in chosen}

    def call(self, *call: Any, **options: Any) -> list[Any]:
        """What the function returned in each process, as for `start`; raises what it raised."""
        return gather(self.start(*call, **options))

    def errors(self, *call: Any, **options: Any) -> list[BaseException | None]:
        """What the function raised in each process, as for `start`."""
        return errors_of(self.start(*call, **options))


def start_each(
    cluster: Cluster, name: str, path: Path, shares: Iterable[Any], **options: Any
) -> dict[int, Future[Any]]:
    """Has each process do the same with its own share, at the same time, and waits for none."""
    return {
        i: process.call(name, path, share, **options)
        for i, (process, share) in enumerate(zip(cluster.processes, shares, strict=True))
    }


def gather(answers: dict[int, Future[Any]]) -> list[Any]:
    return [answer.result(ANSWER_SECS) for answer in answers.values()]


def errors_of(answers: dict[int, Future[Any]]) -> list[BaseException | None]:
    return [answer.exception(ANSWER_SECS) for answer in answers.values()]


@contextlib.contextmanager
def running(
    count: int, logs: Path, *, is_distributed: bool = True, service_at: str = ""
) -> Iterator[Cluster]:
    """Starts `count` processes of two devices each, and ends them.

    JAX's coordination service runs in the first, or in a process apart that listens `service_at`.
    """
    address = service_at or (f"127.0.0.1:{free_port()}" if is_distributed else "none")
    bind = "127.0.0.1:0" if service_at else address
    with _started(count, logs, address, bind) as processes:
        cluster = Cluster(processes)
        for answer in cluster.start("ready").values():  # JAX's devices wait for one another
            answer.result(START_SECS)
        yield cluster


@contextlib.contextmanager
def _started(count: int, logs: Path, address: str, bind: str) -> Iterator[list[Process]]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    processes = [
        Process([str(index), str(count), address, bind], environment, logs / f"process_{index}.log")
        for index in range(count)
    ]
    try:
        yield processes
        for process in processes:  # all at once: `jax.distributed` ends together
            process.ask_to_end()
        for process in processes:
            assert process.was_killed or process.wait(END_SECS) == 0, process.printed()
    finally:
        for process in processes:
            process.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
