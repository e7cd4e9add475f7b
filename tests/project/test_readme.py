"""Every block of code in README.md and docs/ runs, in order, in an empty directory.

`examples` and `benchmarks` lie there too. README.md and the guides, which show how to train, are
run twice: the second time they resume. Pages that need another package (`docs/loops/`,
`docs/from_lightning.md`) are run by `loops/test_loop_docs.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import documents
import jax
import pytest
from documents import DOCUMENTS, GUIDES, OF_LOOPS, ROOT, blocks_of, is_installing, run_blocks

LANGUAGES = {"python", "sh", "text", "json"}


@pytest.mark.parametrize(
    "document", sorted(set(DOCUMENTS) - {*OF_LOOPS, *GUIDES}), ids=lambda path: path.name
)
@pytest.mark.timeout(1200)
def test_blocks_run(document: Path, tmp_path: Path) -> None:
    for folder in ("examples", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    code = (
        "import documents, sys; "
        "documents.run_blocks(documents.Path(sys.argv[1]), times=int(sys.argv[2]))"
    )
    times = 2 if document.name == "README.md" else 1
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, document, str(times)],
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(Path(documents.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if document.name == "README.md":
        assert re.findall(r"(\d) epochs done, going on after step (\d+)", done.stdout) == [
            ("0", "0"),
            ("4", "40"),
        ]
        best = re.findall(r"best validation loss: (.*)", done.stdout)
        assert best[0] == best[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("document", GUIDES, ids=lambda path: path.stem)
def test_guide_runs_and_resumes(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported JAX and Flax: most of them take seconds for that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run_blocks(document, times=2)
    runs = {run.name for run in Path("runs").iterdir()}
    assert runs
    others = "\n".join(page.read_text() for page in DOCUMENTS if page != document)
    assert [run for run in runs if f"runs/{run}" in others] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_are_of_a_known_language(document: Path) -> None:
    text = document.read_text()
    blocks = blocks_of(text)
    assert 2 * len(blocks) == len(re.findall(r"^\s*```", text, re.MULTILINE))
    assert {block.language for block in blocks} <= LANGUAGES


def test_readme_gives_the_two_commands() -> None:
    commands = [b.code for b in blocks_of((ROOT / "README.md").read_text()) if is_installing(b)]
    job, tests = commands
    assert job.rstrip("\n").endswith("python examples/pipeline_lm.py")
    assert "pytest" in tests


def test_a_broken_block_fails_with_its_line(tmp_path: Path) -> None:
    document = tmp_path / "broken.md"
    document.write_text("# Title\n\n```python\nx = 1\n```\n\n```python\nx += 'text'\n```\n")
    with pytest.raises(TypeError) as error:
        run_blocks(document)
    assert (str(error.traceback[-1].path), error.traceback[-1].lineno + 1) == (str(document), 8)
    document.write_text("```sh\nfalse | true\n```\n")
    with pytest.raises(subprocess.CalledProcessError):
        run_blocks(document)
