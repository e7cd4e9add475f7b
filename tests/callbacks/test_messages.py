"""What callbacks say of streamed layers, and of packages that are missing, leads on."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import jax.numpy as jnp
import pytest

import flax_partial as fp
from flax_partial import errors
from flax_partial.callbacks import checkpointing

if TYPE_CHECKING:
    from pathlib import Path

LAYER = {"w": jnp.zeros(2)}


@pytest.mark.parametrize(
    ("hand_over", "leaf", "call"),
    [
        (checkpointing.layer_ready, "params.a.w", "on_layer_ready"),
        (checkpointing.optimizer_state_ready, "opt_state.a.w", "on_optimizer_state_ready"),
    ],
)
def test_a_layer_that_is_handed_over_twice_is_named_with_the_call(
    tmp_path: Path, hand_over: object, leaf: str, call: str
) -> None:
    def twice() -> None:
        with checkpointing(tmp_path, every_n_train_steps=1) as ckpt:
            for _ in range(2):
                hand_over(ckpt, "a", LAYER)  # type: ignore[operator]

    said = f"Leaf '{leaf}' was handed to {call} twice in step 1"
    with pytest.raises(fp.KeyConflictError, match=said) as told:
        twice()
    assert str(tmp_path / "1") in " ".join(told.value.__notes__)


def test_a_streamed_name_that_is_not_in_the_state_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with checkpointing(tmp_path, every_n_train_steps=1) as ckpt:
        for _ in range(2):
            ckpt.layer_ready("haed", LAYER)
            ckpt.optimizer_state_ready("head", LAYER)  # all of that root is streamed
            ckpt.step({"params": {"head": LAYER}})
    (said,) = [one.getMessage() for one in caplog.records]
    assert said.startswith("'params.haed.w' was streamed, and is not in the state")
    assert said.endswith("Did you mean 'params.head.w'?")


_KERAS = """
import sys, types
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "keras":
            raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
sys.meta_path.insert(0, Finder())
import flax_partial.callbacks.keras
"""


def test_keras_that_lacks_its_backend_is_told_of_the_variable() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KERAS], capture_output=True, text=True, check=False
    )
    assert "Set the environment variable KERAS_BACKEND=jax before keras" in done.stderr


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        ('{"url": "file://%s", "dir_info": {}}', "pip install '%s[plot]'"),
        ('{"url": "file://%s/gone", "dir_info": {}}', "pip install '.[plot]' in a checkout"),
        ('{"url": "https://example.org/x.whl"}', "pip install '.[plot]' in a checkout"),
        (None, "pip install '.[plot]' in a checkout"),
    ],
)
def test_extras_are_installed_from_where_the_package_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: str | None, said: str
) -> None:
    info = tmp_path / "flax_partial-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flax-partial\nVersion: 9\n")
    if recorded is not None:
        (info / "direct_url.json").write_text(recorded.replace("%s", str(tmp_path)))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert errors.how_to_install("plot").startswith(said.replace("%s", str(tmp_path)))
