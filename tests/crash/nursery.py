"""A server from which processes are forked that have all loaded and the library preloaded.

Run as a script it is the server: it reads jobs, one JSON a line, and answers each with the exit
status of the process that did it. A process costs milliseconds so, not seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fileops import Action, Plan, build


@dataclass(frozen=True, slots=True)
class Job:
    """What a process is to do.

    Attributes:
      base: The directory below which changes count.
      log: Where they are written down.
      plan: What befalls it.
      step: The step from whose beginning on changes are counted; None for the first.
      with_data: Whether the log holds what was written.
      work: Which of `workload.WORKS` it does.
      durable: Whether it saves durably.
      exits: Whether it ends at its first error, instead of trying again.
    """

    base: Path
    log: Path
    plan: Plan = field(default_factory=Plan)
    step: str | None = None
    with_data: bool = False
    work: str = "everything"
    durable: bool = True
    exits: bool = False


class Nursery:
    """The server, as its users see it.

    Attributes:
      scratch: Where jobs may have places to work in.
    """

    def __init__(self, scratch: Path, *, under: Sequence[str] = ()) -> None:
        """Starts it.

        Args:
          scratch: An absolute path without links.
          under: A command that runs another one, such as strace.

        Raises:
          NoCompilerError: There is nothing to compile the library with.
        """
        self.scratch = scratch
        library = build(scratch)
        before = os.environ.get("LD_PRELOAD")
        preload = f"{library}:{before}" if before else str(library)
        self._server = subprocess.Popen(
            [*under, sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "LD_PRELOAD": preload, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
            text=True,
        )

    def run(self, job: Job) -> int:
        """Does a job in a process of its own; returns 0, or minus the signal that ended it."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asdict(job), default=str) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """Ends the server."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()


def _job(line: str) -> Job:
    fields: dict[str, Any] = json.loads(line)
    plan = fields.pop("plan")
    return Job(
        base=Path(fields.pop("base")),
        log=Path(fields.pop("log")),
        plan=Plan(**{**plan, "action": Action(plan["action"])}),
        **fields,
    )


def _do(job: Job) -> int:
    """Forks; returns the exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        errors = os.open(f"{job.log}.stderr", os.O_WRONLY | os.O_CREAT, 0o666)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        workload.run(job)
        status = 0
    except BaseException:  # noqa: BLE001 - the process ends here
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _serve() -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # whatever prints must not answer
        for line in sys.stdin:
            answers.write(f"{_do(_job(line))}\n")
            answers.flush()


if __name__ == "__main__":
    import workload

    _serve()
