"""The library sees every change: strace, which asks the kernel, sees no other."""

from __future__ import annotations

import collections
import re
import sys
from pathlib import Path

import pytest
from fileops import Kind, NoCompilerError, read_log
from nursery import Job, Nursery
from things import run_or_skip

_CALLS = {
    **dict.fromkeys(("open", "openat", "creat"), Kind.OPEN),
    **dict.fromkeys(("write", "writev", "pwrite64", "pwritev", "pwritev2"), Kind.WRITE),
    **dict.fromkeys(("ftruncate", "truncate"), Kind.TRUNCATE),
    **dict.fromkeys(("rename", "renameat", "renameat2"), Kind.RENAME),
    **dict.fromkeys(("link", "linkat"), Kind.LINK),
    **dict.fromkeys(("symlink", "symlinkat"), Kind.SYMLINK),
    **dict.fromkeys(("unlink", "unlinkat", "rmdir"), Kind.UNLINK),
    **dict.fromkeys(("mkdir", "mkdirat"), Kind.MKDIR),
    **dict.fromkeys(("fsync", "fdatasync"), Kind.FSYNC),
}
# With these a file is changed as well; the library knows none of them.
_STRANGE = ("fallocate", "copy_file_range", "sendfile", "splice", "mmap", "io_uring_setup")
_LINE = re.compile(r"^\d+ +(\w+)\((.*)$")


def of_strace(trace: Path, base: Path) -> collections.Counter[str]:
    """How often each kind of change was begun below `base`, as the kernel tells it."""
    found: collections.Counter[str] = collections.Counter()
    for line in trace.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if not match or (str(base) not in match[2] and match[1] != "io_uring_setup"):
            continue
        name, arguments = match.groups()
        is_opened = name in {"open", "openat"}
        if is_opened and not re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", arguments):
            continue
        if name == "mmap" and not ("MAP_SHARED" in arguments and "PROT_WRITE" in arguments):
            continue
        found[_CALLS[name].name if name in _CALLS else name] += 1
    return found


def of_library(log: Path) -> collections.Counter[str]:
    kinds = [event.kind for event in read_log(log) if event.kind is not Kind.MARK]
    return collections.Counter((Kind.UNLINK if kind is Kind.RMDIR else kind).name for kind in kinds)


def test_the_kernel_is_asked_for_no_change_that_the_library_did_not_see(tmp_path: Path) -> None:
    trace, base, log = tmp_path / "trace", tmp_path / "disk", tmp_path / "log"
    base.mkdir()
    calls = ",".join([*_CALLS, *_STRANGE])
    under = ("strace", "-f", "-qq", "-y", "-s", "0", "-o", str(trace), "-e", f"trace={calls}")
    run_or_skip([*under, sys.executable, "-c", ""])
    try:
        nursery = Nursery(tmp_path, under=under)
    except NoCompilerError as error:
        pytest.skip(str(error))
    assert nursery.run(Job(base, log)) == 0
    nursery.close()
    found = of_strace(trace, base)
    assert found == of_library(log)
    assert found["WRITE"] > 20
