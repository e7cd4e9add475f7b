"""What checkpoints by flax_partial, by Orbax and by a plain thread cost a training loop.

The model and the trainer are those of `examples/pipeline_lm.py`. A checkpoint is a
callback with Lightning's hooks. Measured is a whole interval, from one checkpoint to the next: the
checkpoint is taken after the first step, and if the last step ends before it is written, that is
waited for.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from benchmarks import contenders as by
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_text import Corpus

    from benchmarks.harness import Metrics

EXAMPLES = Path(__file__).parent.parent / "examples"

Tree = Any


@dataclass(frozen=True)
class Size:
    """What is trained, and how often it is saved.

    Attributes:
      vocabulary: Size of the vocabulary.
      length: Tokens of a window.
      windows: Windows of a batch, which passes the pipeline in one piece.
      width: Features.
      layers: Blocks.
      stages: Pipeline stages.
      every: Steps from one checkpoint to the next.
    """

    vocabulary: int
    length: int
    windows: int
    width: int
    layers: int
    stages: int
    every: int


SMALL = Size(vocabulary=256, length=8, windows=8, width=32, layers=2, stages=2, every=2)


class Training:
    """A model that is trained further by each run, with one callback after the other."""

    def __init__(self, size: Size) -> None:
        """Draws the model; its functions are compiled in the first step."""
        if str(EXAMPLES) not in sys.path:
            sys.path.append(str(EXAMPLES))
        from lm_model import ModelConfig
        from lm_module import PipelineModel
        from lm_pipeline import make_stages
        from lm_text import Batches

        self.size = size
        config = ModelConfig(size.vocabulary, size.length, size.width, size.layers)
        batches = Batches(_random_corpus(size), size.length, size.windows, size.every)
        stages = make_stages(config, size.stages)
        self.model = PipelineModel(config, batches, stages, seed=0, micro_batches=1)

    @property
    def leaves(self) -> list[jax.Array]:
        """The arrays of the state as it is now."""
        return jax.tree.leaves(self.model.state())

    @property
    def bytes(self) -> int:
        """Size of the state."""
        return sum(leaf.nbytes for leaf in self.leaves)

    def run(self, callback: object) -> Metrics:
        """Trains for an interval, saving into a new directory.

        Returns:
          `interval`: seconds until all is trained and written.
          `drain`: the part of it after the last step.
          `blocked`: for how long the checkpoint held training in its hooks.
          `blocked/GB`: that, for each 10^9 bytes.
          `own`: that without waiting for computations, where a callback reports them.
          `cpu`: processor time of all threads.
          `steps/s`.
        """
        from trainer import Trainer

        watch = _Watch(callback)
        trainer = Trainer(max_epochs=1, callbacks=[watch])
        trainer.global_step = self.size.every - 1  # so that the first step is one to be saved
        trainer.fit(self.model)
        total = watch.ended - watch.began
        waited = getattr(callback, "waited_secs", 0.0)
        return {
            "interval": total,
            "drain": watch.ended - watch.trained,
            "blocked": watch.held,
            "blocked/GB": watch.held / self.bytes * 1e9,
            "own": watch.held - waited,
            "cpu": watch.cpu_ended - watch.cpu_began,
            "steps/s": self.size.every / total,
        }


def _random_corpus(size: Size) -> Corpus:
    """Returns as many random tokens as one run reads: the example's text is too short for some."""
    from lm_text import Corpus

    count = size.every * size.windows * size.length + 1
    tokens = np.random.default_rng(0).integers(size.vocabulary, size=count, dtype=np.int32)
    return Corpus(tokens, size.vocabulary, digest="")


class _Watch:
    """Stands in for a callback, and adds up the seconds that training spends in its hooks.

    Attributes:
      began: When training began.
      trained: When the last step was computed.
      ended: When all was written.
      held: Seconds in hooks from `began` to `trained`.
      cpu_began: Processor time when training began.
      cpu_ended: Processor time when all was written.
    """

    began = trained = ended = held = cpu_began = cpu_ended = 0.0

    def __init__(self, callback: object) -> None:
        self._callback = callback

    def __getattr__(self, name: str) -> Callable[..., None]:
        hook = getattr(self._callback, name)

        def timed(*arguments: object) -> None:
            start = time.perf_counter()
            hook(*arguments)
            self.held += time.perf_counter() - start

        return timed

    def restore(self, _: Tree, **__: bool) -> None:
        """There is nothing to go on from."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._pass_on("on_train_start", trainer, module)
        jax.block_until_ready(module.state())
        self.began, self.cpu_began, self.held = time.perf_counter(), time.process_time(), 0.0

    def on_train_end(self, trainer: Any, module: Any) -> None:
        jax.block_until_ready(module.state())
        self.trained = time.perf_counter()
        self._pass_on("on_train_end", trainer, module)
        self.ended, self.cpu_ended = time.perf_counter(), time.process_time()

    def _pass_on(self, name: str, *arguments: object) -> None:
        hook = getattr(self._callback, name, None)
        if hook is not None:
            hook(*arguments)


def ours(every: int, directory: Path) -> PartialCheckpointCallback:
    """Our callback, to which the stages stream their layers."""
    return PartialCheckpointCallback(
        directory,
        every_n_epochs=None,
        every_n_train_steps=every,
        group_by=lambda path: str(path[0].key),
        finalizer=FinalizeHook(),
    )


class _AtStepEnd:
    """A callback that saves the trainer's state at the end of a step, after the save before."""

    def __init__(self, every: int, directory: Path) -> None:
        self._every = every
        self._directory = directory
        self._wait: Callable[[], object] = lambda: None

    def on_fit_start(self, _trainer: Any, _module: Any) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)

    def on_train_batch_end(self, trainer: Any, *_: object) -> None:
        if trainer.global_step % self._every == 0:
            self._wait()
            self._wait = self._save(self._directory / str(trainer.global_step), trainer.state)

    def on_train_end(self, _trainer: Any, _module: Any) -> None:
        self._wait()

    def _save(self, path: Path, state: Tree) -> Callable[[], object]:
        """Begins to save; returns what waits for it."""
        raise NotImplementedError


class OrbaxAsync(_AtStepEnd):
    """Orbax's `save_async`, which waits until the arrays are computed.

    Attributes:
      waited_secs: For how long; waited for before the call, to measure it apart from the rest.
    """

    waited_secs = 0.0

    def _save(self, path: Path, state: Tree) -> Callable[[], object]:
        start = time.perf_counter()
        jax.block_until_ready(state)
        self.waited_secs += time.perf_counter() - start
        return ocp.save_async(path, state).result


class PlainThread(_AtStepEnd):
    """The same bytes, copied to pinned memory and written to one file by a thread of its own."""

    def _save(self, path: Path, state: Tree) -> Callable[[], object]:
        arrays = jax.tree.leaves((state["params"], state["opt_state"]))
        shardings = [array.sharding.with_memory_kind("pinned_host") for array in arrays]
        copies = jax.device_put(arrays, shardings, may_alias=False)
        thread = ThreadPoolExecutor(1)
        writing = thread.submit(by.save_plainly, copies, path)
        thread.shutdown(wait=False)
        return writing.result
