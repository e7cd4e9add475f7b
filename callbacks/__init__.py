"""Callbacks that attach flax_partial to a training loop.

from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

hook = FinalizeHook()
callbacks = [PartialCheckpointCallback("runs/lm", keep_last=3, finalizer=hook)]

A plain `for` loop has `checkpointing`. Other loops have a module each, which needs their package:
`flax_partial.callbacks.lightning`, `.keras`, `.clu`, `.tunix`, and `.blaxbird`. Which checkpoints
are kept, policies say (`keep=[LatestN(3), ...]`); `.policies` has them all.
"""

from flax_partial.callbacks._reports import CheckpointReport
from flax_partial.callbacks.finalize_hook import FinalizeHook
from flax_partial.callbacks.partial_checkpoint import PartialCheckpointCallback
from flax_partial.callbacks.plain import checkpointing
from flax_partial.callbacks.policies import BestN, EveryInterval, EveryNSteps, LatestN

__all__ = [
    "BestN",
    "CheckpointReport",
    "EveryInterval",
    "EveryNSteps",
    "FinalizeHook",
    "LatestN",
    "PartialCheckpointCallback",
    "checkpointing",
]
