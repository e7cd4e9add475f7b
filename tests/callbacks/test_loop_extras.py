"""What an adapter needs is looked for by that adapter alone, and named where it is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

_ABSENT = """
import sys

class Absent:
    def find_spec(name, *_):
        if name == "{package}":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent)
import flax_partial.callbacks.{module}
"""

PACKAGES = {"lightning": "lightning", "keras": "keras", "clu": "clu", "tunix": "tunix"}


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code], check=False, capture_output=True, text=True, timeout=500
    )


def test_the_callbacks_import_none_of_the_loops_they_adapt_to() -> None:
    done = _python("import flax_partial.callbacks, sys; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {*PACKAGES.values(), "blaxbird", "torch", "tensorflow"}


@pytest.mark.parametrize(("module", "package"), PACKAGES.items())
def test_a_missing_package_is_named_with_how_to_install_it(module: str, package: str) -> None:
    done = _python(_ABSENT.format(package=package, module=module))
    assert done.returncode == 1
    said = (
        f"ModuleNotFoundError: flax_partial.callbacks.{module} needs the package {package!r}, "
        "which is not installed. Install it with: pip install "
    )
    *_, last = done.stderr.splitlines()
    assert last.startswith(said)
    assert f"[{module}]'" in last.removeprefix(said)


def test_blaxbirds_hook_needs_no_package() -> None:
    done = _python(
        "import sys; sys.modules['blaxbird'] = None; import flax_partial.callbacks.blaxbird"
    )
    assert done.returncode == 0, done.stderr
