"""The rooms import those below them only, and little is loaded.

The contracts stand in `pyproject.toml`; here they are held against the installed package, and each
kind of them is broken once, to show that it can fail.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
from documents import ROOT

import flax_partial

_LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    """Checks the package found in `directory`, or the installed one where it holds none."""
    arguments = ["--no-cache", "--config", ROOT / "pyproject.toml"]
    return subprocess.run(
        [sys.executable, "-P", "-c", _LINT, *arguments],
        cwd=directory,
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_installed_package_keeps_all_contracts(tmp_path: Path) -> None:
    done = lint_imports(tmp_path)
    assert done.returncode == 0, done.stdout
    assert ", 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        pytest.param(
            "loading/load.py",
            "import flax_partial.saving.save",
            "Finalizing and loading do not know how a save works",
            id="loading imports saving",
        ),
        pytest.param(
            "format/chunks.py",
            "import flax_partial.storage",
            "Rooms import those below them only",
            id="a lower room imports a higher one",
        ),
        pytest.param(
            "newcomer.py",
            "",
            "Rooms import those below them only",
            id="a module in no room",
        ),
        pytest.param(
            "callbacks/loop.py",
            "import flax_partial.sessions",
            "Callbacks use public names only",
            id="a callback reaches into a room",
        ),
        pytest.param(
            "callbacks/loop.py",
            "import tensorstore",
            "Files, locks and tensorstore are the business of storage",
            id="tensorstore outside storage",
        ),
        pytest.param(
            "loading/load.py",
            "import orbax.checkpoint",
            "Works without Orbax, and does not make users import Flax or Optax",
            id="Orbax anywhere",
        ),
    ],
)
def test_a_broken_contract_is_seen(file: str, line: str, broken: str, tmp_path: Path) -> None:
    copy = shutil.copytree(Path(flax_partial.__file__).parent, tmp_path / "flax_partial")
    with (copy / file).open("a") as module:
        module.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{broken} BROKEN" in " ".join(done.stdout.split())
    assert f"flax_partial/{file}".removesuffix(".py").replace("/", ".") in done.stdout


def test_private_parts_of_jax_are_used_in_one_module() -> None:
    graph = grimp.build_graph("flax_partial", include_external_packages=True, cache_dir=None)
    users = {
        module
        for module in graph.find_modules_that_directly_import("jax")
        for detail in graph.get_import_details(importer=module, imported="jax")
        if "jax._src" in detail["line_contents"]
    }
    assert users == {"flax_partial.distributed.jax_service"}


def test_import_loads_nothing_that_only_some_users_need() -> None:
    code = "import flax_partial, sys; assert 'jax' not in sys.modules"
    code += "; flax_partial.save; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, timeout=500
    )
    loaded = set(done.stdout.split())
    assert "flax_partial" in loaded
    assert not loaded & {"flax", "optax", "orbax", "rich", "matplotlib"}
