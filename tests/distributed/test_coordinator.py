"""With JAX's coordination service in a process apart, process 0 dies alone; the others say so."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import free_port, running

import flax_partial as fp

COMMAND = (sys.executable, "-m", "flax_partial.coordinator")


@pytest.fixture
def service() -> Iterator[str]:
    """The address of a service for three processes, which ends when it is told to."""
    address = f"127.0.0.1:{free_port()}"
    with subprocess.Popen(
        [*COMMAND, address, "--processes", "3"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"serving 3 processes at {address}\n"
            yield address
            process.send_signal(signal.SIGTERM)
            assert process.wait(250) == 0
        finally:
            process.kill()


def test_others_name_the_first_process_when_it_dies_and_go_on_without_it(
    service: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "c")
    with running(3, tmp_path, service_at=service) as three:
        three.call("save", path, {"w": 1})
        assert three.call("finalize", path) == [["w"]] * 3
        begun = three.start("finalize", f"{path}2", on=[1, 2], timeout_secs=2)
        three.processes[0].kill()
        errors = [answer.exception(250) for answer in begun.values()]
        assert [type(error) for error in errors] == [fp.IncompleteCheckpointError] * 2
        assert all("[0]" in str(error) for error in errors)
        three.errors("finalize", path, on=[1, 2], timeout_secs=1)
        three.call("save", f"{path}3", {"w": 1}, on=[1, 2])
        assert three.call("finalize", f"{path}3", on=[1, 2], processes=[1, 2]) == [["w"]] * 2
        for process in three.processes[1:]:
            process.kill()  # their own end would wait for the first to come to it


def test_wrong_use_is_told(service: str) -> None:
    for arguments, status, said in (
        ([service, "--processes", "0"], 2, "--processes: 0"),
        ([service, "--processes", "2"], 1, f"Cannot serve at {service}: [Errno 98]"),
        (["127.0.0.1:no", "--processes", "2"], 1, "Cannot serve at 127.0.0.1:no"),
        (["127.0.0.1:65536", "--processes", "2"], 1, "port must be 0-65535"),
    ):
        done = subprocess.run(
            [*COMMAND, *arguments], check=False, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status
        assert said in done.stderr
