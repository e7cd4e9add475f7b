"""A real `lightning.Trainer` fits a module that trains in JAX, stops in any way, and goes on."""

from __future__ import annotations

import copy
import pickle
import signal
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import pytest
from small_model import assert_equal, new_state, run_until_killed, train

import flax_partial as fp

lightning = pytest.importorskip("lightning", reason="pip install 'flax-partial[lightning]'")
torch = pytest.importorskip("torch", reason="pip install 'flax-partial[lightning]'")

from flax_partial.callbacks.lightning import LightningCheckpoint  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

BATCHES, EPOCHS = 5, 3


class Numbers(torch.utils.data.Dataset):  # type: ignore[misc]
    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(index / 7, dtype=torch.float32)


class Resumable(torch.utils.data.DataLoader):  # type: ignore[misc]
    """Says which batch it is at, as Lightning wants it from a loader that resumes within epochs."""

    def __init__(self) -> None:
        super().__init__(Numbers(), batch_size=1)
        self.done = self.skipped = 0

    def __iter__(self) -> Any:
        start, self.skipped = self.skipped, 0
        for self.done, batch in enumerate(list(super().__iter__())[start:], start=start + 1):
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["done"] % BATCHES


class Lit(lightning.LightningModule):  # type: ignore[misc]
    """Trains `state`, which is all JAX's; raises `stop` before step number `at`."""

    def __init__(self, *, stop: BaseException | None = None, at: int = -1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.state = new_state()
        self.stop, self.at = stop, at
        self.seen: list[tuple[int, int]] = []

    def configure_optimizers(self) -> None:
        return None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == self.at and self.stop is not None:
            raise self.stop
        self.seen.append((self.current_epoch, batch_idx))
        self.state, loss = train(self.state, jnp.float32(batch.item() + self.current_epoch))
        self.log("loss", torch.tensor(float(loss)))

    def validation_step(self, *_: Any) -> None:
        self.log("val_loss", torch.tensor(float(self.state["params"]["head"][0])))

    def test_step(self, *_: Any) -> None:
        pass

    def predict_step(self, *_: Any) -> None:
        pass


class Counting(Lit):
    """One with an optimizer of PyTorch's, whose steps Lightning counts."""

    def __init__(self, every: int = 2) -> None:
        super().__init__()
        self.every = every
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.weight], lr=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        if (batch_idx + 1) % self.every == 0:  # the rest is accumulated
            self.optimizers().step()


def fit(
    directory: Path, module: Any, *callbacks: Any, ckpt_path: Path | None = None, **options: Any
) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=directory,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        **{"max_epochs": EPOCHS, "enable_checkpointing": False} | options,
    )
    validation = torch.utils.data.DataLoader(Numbers(), batch_size=1)
    trainer.fit(module, Resumable(), validation, ckpt_path=ckpt_path)
    return trainer


def uninterrupted(steps: int = BATCHES * EPOCHS) -> Any:
    return trained(new_state(), range(steps))


def trained(state: Any, steps: range) -> Any:
    for step in steps:
        epoch, batch = divmod(step, BATCHES)
        number = torch.tensor(batch / 7, dtype=torch.float32).item()
        state, _ = train(state, jnp.float32(number + epoch))
    return state


def saved(directory: Path) -> Any:
    """The state in the newest checkpoint, without what Lightning and PyTorch have in it."""
    newest = fp.latest(directory)
    assert newest is not None
    beside = ("lightning", "torch")
    return {root: leaves for root, leaves in fp.load(newest).items() if root not in beside}


def test_it_is_a_callback_of_lightnings(tmp_path: Path) -> None:
    callback = LightningCheckpoint(tmp_path / "run", monitor="val_loss", save_top_k=1)
    assert isinstance(callback, lightning.Callback)
    trainer = fit(tmp_path, Lit(), callback)
    assert callback in trainer.callbacks
    assert trainer.global_step == BATCHES * EPOCHS
    found = fp.metadata(fp.latest(tmp_path / "run") or "")
    assert found.training["epoch"] == EPOCHS - 1
    assert set(found.custom_metadata["metrics"]) == {"loss", "val_loss"}
    assert_equal(saved(tmp_path / "run"), uninterrupted())


@pytest.mark.parametrize("at", [2, 4, 5, 7, 11])
def test_stopped_by_an_error_goes_on_at_the_same_batch(tmp_path: Path, at: int) -> None:
    def callback() -> Any:
        return LightningCheckpoint(tmp_path / "run", every_n_train_steps=2)

    with pytest.raises(ValueError, match="enough"):
        fit(tmp_path, Lit(stop=ValueError("enough"), at=at), callback())
    module = Lit()
    trainer = fit(tmp_path, module, callback())
    assert module.seen[0] == divmod(max({0, *range(2, at + 1, 2), *range(5, at + 1, 5)}), BATCHES)
    assert trainer.global_step == BATCHES * EPOCHS
    assert_equal(module.state, uninterrupted())
    assert_equal(saved(tmp_path / "run"), uninterrupted())


def test_stopped_by_ctrl_c_goes_on(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(tmp_path, Lit(stop=KeyboardInterrupt(), at=8), LightningCheckpoint(tmp_path / "run"))
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert fp.steps(tmp_path / "run") == [5]
    module = Lit()
    fit(tmp_path, module, LightningCheckpoint(tmp_path / "run"))
    assert_equal(module.state, uninterrupted())


_KILLED = """
import os, signal, sys
from pathlib import Path
import test_lightning_loop as loop

class Killed(loop.Lit):
    def training_step(self, batch, batch_idx):
        if self.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        super().training_step(batch, batch_idx)

directory = Path(sys.argv[1])
checkpoints = loop.LightningCheckpoint(directory / "run", every_n_train_steps=3)
loop.fit(directory, Killed(), checkpoints)
"""


def test_killed_goes_on(tmp_path: Path) -> None:
    run_until_killed(_KILLED, __file__, tmp_path)
    module = Lit()
    fit(tmp_path, module, LightningCheckpoint(tmp_path / "run", every_n_train_steps=3))
    assert len(module.seen) < BATCHES * EPOCHS - 2
    assert_equal(module.state, uninterrupted())


def test_max_steps_stops_in_mid_epoch_and_more_of_them_go_on(tmp_path: Path) -> None:
    trainer = fit(
        tmp_path, Lit(), LightningCheckpoint(tmp_path / "run"), max_steps=7, max_epochs=-1
    )
    assert trainer.global_step == 7
    assert fp.steps(tmp_path / "run") == [5, 7]
    module = Lit()
    fit(tmp_path, module, LightningCheckpoint(tmp_path / "run"), max_steps=12, max_epochs=-1)
    assert module.seen[0] == (1, 2)
    assert_equal(module.state, uninterrupted(12))


def test_validation_within_the_epoch_changes_nothing(tmp_path: Path) -> None:
    callback = LightningCheckpoint(tmp_path / "run", every_n_train_steps=3, monitor="val_loss")
    fit(tmp_path, Lit(), callback, val_check_interval=2)
    steps = fp.steps(tmp_path / "run")
    assert steps == [3, 5, 6, 9, 10, 12, 15]
    custom = {step: fp.metadata(tmp_path / "run" / str(step)).custom_metadata for step in steps}
    assert [one for one in steps if "val_loss" in custom[one]["metrics"]] == [9, 12]
    assert_equal(saved(tmp_path / "run"), uninterrupted())


def test_works_beside_model_checkpoint_which_sees_the_steps_counted(tmp_path: Path) -> None:
    theirs = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path / "theirs", filename="{step}", every_n_train_steps=4, save_top_k=-1
    )
    ours = LightningCheckpoint(tmp_path / "ours", every_n_train_steps=4, every_n_epochs=None)
    fit(tmp_path, Lit(), theirs, ours, enable_checkpointing=True)
    assert fp.steps(tmp_path / "ours") == [4, 8, 12]
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {
        "step=4.ckpt",
        "step=8.ckpt",
        "step=12.ckpt",
    }
    inside = torch.load(tmp_path / "theirs" / "step=12.ckpt", weights_only=True)
    assert inside["callbacks"][ours.state_key]["last_saved"] == 12


class Both(Lit):
    """Trains a weight in PyTorch as well: each step adds to it, with momentum, less and less."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([self.weight], lr=1.0, momentum=0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        (-self.weight.sum()).backward()
        optimizer.step()
        if batch_idx == BATCHES - 1:
            self.lr_schedulers().step()


def of_lightnings(directory: Path) -> Any:
    return lightning.pytorch.callbacks.ModelCheckpoint(
        directory / "theirs", filename="{step}", save_top_k=-1
    )


def fit_both(directory: Path, module: Any, epochs: int, path: str | None, **options: Any) -> Any:
    ours = LightningCheckpoint(directory / "ours", **options)
    saving: Any = {"enable_checkpointing": True, "max_epochs": epochs}
    ckpt_path = path and directory / "theirs" / path
    fit(directory, module, of_lightnings(directory), ours, ckpt_path=ckpt_path, **saving)
    return module


@pytest.mark.parametrize("path", ["step=10.ckpt", None])
def test_jax_and_pytorch_go_on_at_the_same_step(tmp_path: Path, path: str | None) -> None:
    whole = fit_both(tmp_path / "whole", Both(), EPOCHS, None)
    fit_both(tmp_path, Both(), 2, None)
    module = fit_both(tmp_path, Both(), EPOCHS, path)
    assert [epoch for epoch, _ in module.seen] == [2] * BATCHES
    assert fp.steps(tmp_path / "ours") == [5, 10, 15]
    assert_equal(module.state, uninterrupted())
    assert torch.equal(module.weight, whole.weight)


def test_an_older_ckpt_path_takes_the_older_checkpoint(tmp_path: Path) -> None:
    fit_both(tmp_path, Both(), 2, None)
    with pytest.raises(fp.CheckpointExistsError, match="discard_later") as told:
        fit_both(tmp_path, Both(), 2, "step=5.ckpt")
    assert "resume={" in "".join(told.value.__notes__)
    module = fit_both(tmp_path, Both(), 2, "step=5.ckpt", resume={"discard_later": True})
    assert module.seen[0] == (1, 0)
    assert_equal(module.state, uninterrupted(2 * BATCHES))


def test_a_ckpt_path_that_has_nothing_left_to_train_restores_all_the_same(tmp_path: Path) -> None:
    fit_both(tmp_path, Lit(), 2, None)
    module = fit_both(tmp_path, Lit(), 2, "step=10.ckpt")
    assert not module.seen
    assert_equal(module.state, uninterrupted(2 * BATCHES))


def test_a_ckpt_path_without_a_checkpoint_of_its_step_is_an_error(tmp_path: Path) -> None:
    fit_both(tmp_path, Lit(), 2, None)
    fp.remove(tmp_path / "ours" / "10")
    with pytest.raises(fp.NoSessionError, match="no checkpoint of step 10") as told:
        fit_both(tmp_path, Lit(), EPOCHS, "step=10.ckpt")
    assert "resume=False" in "".join(told.value.__notes__)
    with pytest.raises(ValueError, match="goes on from step 10"):
        fit_both(tmp_path, Lit(), EPOCHS, "step=10.ckpt", resume={"which": 5})
    module = fit_both(tmp_path, Lit(), EPOCHS, "step=10.ckpt", resume=False)
    assert_equal(module.state, trained(new_state(), range(10, 15)))


def test_going_back_is_done_once_and_when_it_is_asked_for(tmp_path: Path) -> None:
    fit(tmp_path, Lit(), LightningCheckpoint(tmp_path / "run"))
    back: Any = {"which": 5}
    with pytest.raises(fp.CheckpointExistsError):
        fit(tmp_path, Lit(), LightningCheckpoint(tmp_path / "run", resume=back))
    assert fp.steps(tmp_path / "run") == [5, 10, 15]
    callback = LightningCheckpoint(tmp_path / "run", resume=back | {"discard_later": True})
    for steps in (range(5, 10), range(0)):
        module = Lit()
        fit(tmp_path, module, callback, max_epochs=2)
        assert module.seen == [divmod(step, BATCHES) for step in steps]
        assert_equal(module.state, uninterrupted(2 * BATCHES))
    assert fp.steps(tmp_path / "run") == [5, 10]


def test_second_fit_of_one_trainer_goes_on(tmp_path: Path) -> None:
    module, callback = Lit(), LightningCheckpoint(tmp_path / "run")
    trainer = fit(tmp_path, module, callback, max_epochs=1)
    trainer.fit_loop.max_epochs = EPOCHS
    trainer.fit(module, Resumable())
    assert_equal(module.state, uninterrupted())
    assert fp.steps(tmp_path / "run") == [5, 10, 15]


def _pickled(one: Any) -> Any:
    return pickle.loads(pickle.dumps(one))  # noqa: S301 - of this test


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_copy_of_a_callback_goes_on_where_the_first_one_failed(tmp_path: Path, copied: Any) -> None:
    callback = LightningCheckpoint(tmp_path / "run", monitor="loss")
    copy_ = copied(callback)
    assert copy_.state_key == callback.state_key
    with pytest.raises(ValueError, match="wrong"):
        fit(tmp_path, Lit(at=7, stop=ValueError("wrong")), callback)
    module = Lit()
    fit(tmp_path, module, copy_)
    assert_equal(module.state, uninterrupted())


def test_what_is_no_training_saves_restores_and_removes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, Lit(), LightningCheckpoint(tmp_path / "run"))
    fp.save(tmp_path / "run" / "20", {"a": 1})  # what another process may be saving

    def there() -> Any:
        return sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))

    before = there()
    for directory in ("run", "never made"):
        callback = LightningCheckpoint(tmp_path / directory, every_n_train_steps=1, keep_last=1)
        module = Lit()
        trainer = fit(tmp_path, module, callback, fast_dev_run=2)
        assert module.seen == [(0, 0), (0, 1)]
        for call in (trainer.validate, trainer.test, trainer.predict):
            call(module, torch.utils.data.DataLoader(Numbers(), batch_size=1))
        assert_equal(module.state, trained(new_state(), range(2)))
    assert there() == before
    assert not (tmp_path / "never made").exists()


def test_resume_takes_what_restore_takes(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="what `restore` takes: cast, discard_later"):
        LightningCheckpoint(tmp_path, resume={"step": 5})  # type: ignore[typeddict-unknown-key]


def test_steps_of_pytorchs_optimizers_are_counted_by_lightning_alone(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Counting(), LightningCheckpoint(tmp_path / "run"))
    assert trainer.global_step == 2 * EPOCHS
    assert fp.steps(tmp_path / "run") == [2, 4, 6]
    assert_equal(saved(tmp_path / "run"), uninterrupted())


def test_an_optimizer_of_pytorchs_that_never_steps_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, Counting(every=BATCHES + 1), LightningCheckpoint(tmp_path / "run"))
    assert not fp.steps(tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if "no step" in record.getMessage()]
    assert len(said) == EPOCHS
    assert "Counting has optimizers" in said[0]


def test_layers_are_streamed_from_within_the_training_step(tmp_path: Path) -> None:
    class Streaming(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            callback.on_layer_ready(self.trainer, "head", self.state["params"]["head"])

    callback = LightningCheckpoint(tmp_path / "run", every_n_train_steps=4, every_n_epochs=None)
    fit(tmp_path, Streaming(), callback)
    assert [report.groups[0] for report in callback.reports] == ["params.head"] * 3
    assert_equal(saved(tmp_path / "run"), uninterrupted(12))


def test_two_callbacks_count_a_step_once(tmp_path: Path) -> None:
    one = LightningCheckpoint(tmp_path / "one", every_n_epochs=1)
    two = LightningCheckpoint(tmp_path / "two", every_n_epochs=2)
    assert fit(tmp_path, Lit(), one, two).global_step == BATCHES * EPOCHS
    assert fp.steps(tmp_path / "two") == [10]


def test_a_module_without_state_is_refused_before_it_trains(tmp_path: Path) -> None:
    module = Lit()
    module.state = None
    with pytest.raises(TypeError, match=r"Lit\.state is NoneType"):
        fit(tmp_path, module, LightningCheckpoint(tmp_path / "run"))
    assert not module.seen


def test_without_resume_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, Lit(), LightningCheckpoint(tmp_path / "run"), max_epochs=1)
    with pytest.raises(fp.CheckpointExistsError):
        fit(tmp_path, Lit(), LightningCheckpoint(tmp_path / "run", resume=False))


VAL_LOSSES = {2: 0.9, 4: 0.1, 6: 0.5, 8: 0.7, 10: 0.2}


class Validated(Lit):
    """Its validation knows the step."""

    logs_late = False

    def validation_step(self, *_: Any) -> None:
        if not self.logs_late:
            self.log("val_loss", torch.tensor(VAL_LOSSES.get(self.global_step, 9.0)))

    def on_train_epoch_end(self) -> None:
        if self.logs_late:
            self.log("val_loss", torch.tensor(VAL_LOSSES.get(self.global_step, 9.0)))


def scores(directory: Path) -> dict[int, float | None]:
    def of(step: int) -> float | None:
        custom = fp.metadata(directory / str(step)).custom_metadata
        return custom.get("metrics", {}).get("val_loss")  # type: ignore[no-any-return]

    return {step: of(step) for step in fp.steps(directory)}


@pytest.mark.parametrize("sanity_steps", [0, 1])
def test_checkpoint_has_the_score_of_its_own_step_wherever_validation_comes(
    tmp_path: Path, sanity_steps: int
) -> None:
    by_steps = {"every_n_epochs": None, "every_n_train_steps": 1}
    ours = LightningCheckpoint(tmp_path / "run", monitor="val_loss", **by_steps)
    options = {"max_steps": 10, "val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(tmp_path, Validated(), ours, num_sanity_val_steps=sanity_steps, **options)
    expected = {step: VAL_LOSSES.get(step) for step in range(1, 11)}
    assert scores(tmp_path / "run") == pytest.approx(expected, nan_ok=True)
    assert ours.best_model_path == str(tmp_path / "run" / "4")


@pytest.mark.parametrize(
    ("monitor", "is_told"), [("val_accuracy", True), ("train_accuracy", False), ("val_loss", False)]
)
def test_monitor_that_the_sanity_check_has_not_set_is_told_after_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monitor: str, *, is_told: bool
) -> None:
    ours = LightningCheckpoint(tmp_path / "run", monitor=monitor, every_n_epochs=2)
    fit(tmp_path, Validated(), ours, num_sanity_val_steps=1, max_steps=1)
    assert ("After the first step the monitor" in caplog.text) == is_told


@pytest.mark.parametrize("logs_late", [False, True], ids=["validation", "on_train_epoch_end"])
def test_epoch_has_the_score_of_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, logs_late: bool
) -> None:
    module = Validated()
    module.logs_late = logs_late
    ours = LightningCheckpoint(tmp_path / "run", monitor="val_loss")
    fit(tmp_path, module, ours, max_epochs=2)
    assert scores(tmp_path / "run") == pytest.approx({5: 9.0, 10: 0.2})
    assert "had no score" not in caplog.text


def test_two_callbacks_save_into_two_directories(tmp_path: Path) -> None:
    newest = LightningCheckpoint(tmp_path / "newest", keep_last=2)
    milestones = LightningCheckpoint(tmp_path / "milestones", keep_every_n_steps=10)
    fit(tmp_path, Lit(), newest, milestones)
    assert [fp.steps(one.directory) for one in (newest, milestones)] == [[10, 15], [10, 15]]
