"""The package reads as a pipeline: lower modules know nothing of higher ones, and little is loaded.

The table below is the architecture: a new module is entered here, with what stands right below it.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

# What a module may import of the package, beside whatever those may import themselves.
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "chunks": set(),
    "collector": set(),
    "memory_budget": set(),
    "options": set(),
    "coordination": {"errors"},
    "coordinator": {"coordination"},
    "processes": {"coordination"},
    "reports": {"errors"},
    "keypaths": {"errors"},
    "part": {"keypaths", "chunks", "options"},
    "merge": {"part"},
    "ledger": {"part"},
    "data_files": {"part"},
    "ocdbt": set(),
    "orbax_format": {"merge", "ocdbt"},
    "arrays": {"orbax_format"},
    "direct_io": set(),
    "reuse": {"part"},
    "saved_arrays": {"reuse"},
    "part_data": {"arrays", "direct_io", "reuse", "storage", "workers"},
    "snapshot": {"part"},
    "placing": {"snapshot"},
    "storage": {"errors"},
    "workers": {"reports"},
    "session": {
        "collector",
        "ledger",
        "memory_budget",
        "options",
        "part_data",
        "processes",
        "saved_arrays",
        "snapshot",
        "storage",
        "workers",
    },
    "batches": {"arrays"},
    "orbax_reader": {"orbax_format", "arrays", "storage"},
    "loading": {"batches", "collector", "data_files", "orbax_reader", "placing", "session"},
    "finalizing": {"loading"},
    "catalog": {"orbax_reader", "session"},
    "__init__": {"finalizing", "catalog"},
    "__main__": {"__init__"},
}

# Of the command line, right above the package: it may use any module of it, and is used by none.
CLI_BELOW: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "figures": set(),
    "tables": set(),
    "tree": set(),
    "safetensors": set(),
    "selection": {"errors"},
    "comparing": {"figures"},
    "changes": {"comparing"},
    "output": {"tables"},
    "places": {"errors"},
    "parsing": {"output"},
    "listing": {"figures", "parsing", "places"},
    "showing": {"figures", "parsing", "places", "selection", "tree"},
    "status": {"figures", "parsing", "places"},
    "verifying": {"figures", "parsing", "places"},
    "ending": {"figures", "parsing", "places"},
    "diffing": {"changes", "parsing", "places", "selection"},
    "exporting": {"figures", "parsing", "places", "safetensors", "selection"},
    "lanes": set(),
    "chrome_trace": {"lanes"},
    "picture": {"errors", "figures", "lanes"},
    "timeline": {"chrome_trace", "parsing", "picture", "places"},
    "main": {
        "listing",
        "showing",
        "status",
        "verifying",
        "ending",
        "diffing",
        "exporting",
        "timeline",
    },
}

# What only some modules of the package (and of the callbacks) may import: one seam for each.
ONLY_IN: dict[str, set[str]] = {
    "tensorstore": {"arrays"},
    "fcntl": {"direct_io", "storage"},
    "shutil": {"storage"},
    "ctypes": {"memory_budget", "storage"},
    "jax._src": {"coordination"},
    "orbax": set(),
}

_LEAVE_OUT = ("flax", "optax", "orbax", "rich", "matplotlib")


def _folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


PACKAGE = _folder("flax_partial")
CALLBACKS = _folder("flax_partial.callbacks")
MODULES = sorted(PACKAGE.glob("*.py"))
CALLBACK_MODULES = sorted(CALLBACKS.rglob("*.py"))
CLI_MODULES = sorted((PACKAGE / "cli").glob("*.py"))


def _imports(path: Path, package: str = "flax_partial") -> set[str]:
    """Dotted names of all that a file imports, wherever in it and for types only too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outer = package.split(".")[: package.count(".") + 2 - node.level]
                base = ".".join([*outer, base] if base else outer)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def _under(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}.")


def _allowed(module: str, table: dict[str, set[str]] = BELOW) -> frozenset[str]:
    below = table[module]
    return frozenset(below).union(*(_allowed(lower, table) for lower in below))


def _name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_module_imports_only_what_stands_below_it(path: Path) -> None:
    modules = {module.stem for module in MODULES}
    parts = [name.split(".") for name in _imports(path) if _under(name, "flax_partial")]
    # A name that is no module is one of the package's own, which stands above all of them.
    imported = {p[1] if len(p) > 1 and p[1] in modules else "__init__" for p in parts}
    assert path.stem in BELOW, "a new module: give it its place in the table"
    assert imported <= _allowed(path.stem)


@pytest.mark.parametrize("path", CLI_MODULES, ids=_name)
def test_module_of_the_command_line_imports_only_what_stands_below_it(path: Path) -> None:
    prefix = "flax_partial.cli."
    imported = {
        name.removeprefix(prefix).split(".")[0]
        for name in _imports(path)
        if name.startswith(prefix)
    }
    assert path.stem in CLI_BELOW, "a new module: give it its place in the table"
    assert imported <= _allowed(path.stem, CLI_BELOW)


def test_nothing_but_its_own_program_imports_the_command_line() -> None:
    users = {
        path.stem
        for path in MODULES + CALLBACK_MODULES
        if any(_under(name, "flax_partial.cli") for name in _imports(path))
    }
    assert users == {"__main__"}


def test_tables_name_no_module_that_is_gone() -> None:
    assert set(BELOW) <= {module.stem for module in MODULES}
    assert set(CLI_BELOW) <= {module.stem for module in CLI_MODULES}


@pytest.mark.parametrize("path", MODULES + CALLBACK_MODULES + CLI_MODULES, ids=_name)
def test_each_seam_is_one_module(path: Path) -> None:
    imported = _imports(path)
    broken = {
        root
        for root, modules in ONLY_IN.items()
        if any(_under(name, root) for name in imported)
        and not (path in MODULES and path.stem in modules)
    }
    assert not broken


@pytest.mark.parametrize("path", CALLBACK_MODULES, ids=_name)
def test_callbacks_use_public_names_only(path: Path) -> None:
    import flax_partial

    package = ".".join(["flax_partial.callbacks", *path.parent.relative_to(CALLBACKS).parts])
    imported = {
        name
        for name in _imports(path, package)
        if _under(name, "flax_partial") and not _under(name, "flax_partial.callbacks")
    }
    tree = ast.parse(path.read_text())
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "flax_partial"
    }
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in aliases
    }
    used |= {name.removeprefix("flax_partial.") for name in imported - {"flax_partial"}}
    assert used <= set(flax_partial.__all__)


def _python(code: str, *arguments: object) -> str:
    """What `code` prints in a fresh interpreter, which -P keeps from importing the checkout."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_flax_nor_optax_nor_orbax() -> None:
    code = "import flax_partial, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = _python(code).split()
    assert "flax_partial" in loaded
    assert not set(_LEAVE_OUT) & set(loaded)


_TRACED_SAVE = """
import sys
from pathlib import Path
import jax.numpy as jnp
import flax_partial as fp

package = str(Path(fp.__file__).parent)
array = jnp.arange(8.0).block_until_ready()
files, threads = set(), []

def profile(frame, event, function):
    if event == "call" and frame.f_code.co_filename.startswith(package):
        files.add(Path(frame.f_code.co_filename).name)
    elif event == "c_call" and "thread" in function.__name__ and "start" in function.__name__:
        threads.append(function.__name__)

sys.setprofile(profile)
fp.save(sys.argv[1], {"a": array})
sys.setprofile(None)
print(len(threads), *sorted(files))
"""


def test_one_save_enters_few_files_and_starts_no_thread(tmp_path: Path) -> None:
    threads, *files = _python(_TRACED_SAVE, tmp_path / "checkpoint").split()
    assert "session.py" in files
    assert len(files) <= 8, files
    assert threads == "0"


def test_a_started_thread_would_have_been_counted(tmp_path: Path) -> None:
    """The check above can fail: the same trace of an asynchronous save counts its thread."""
    code = _TRACED_SAVE.replace("fp.save(", "fp.save_async(").replace("})\n", "}).result()\n", 1)
    threads, *_ = _python(code, tmp_path / "checkpoint").split()
    assert int(threads) >= 1
