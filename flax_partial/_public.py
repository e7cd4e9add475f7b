"""The public names, which the package offers as its own."""

from flax_partial.distributed.agreement import agree
from flax_partial.errors import (
    CheckpointExistsError,
    CheckpointInUseError,
    CorruptCheckpointError,
    EmptyStateError,
    ForkedProcessError,
    IncompleteCheckpointError,
    KeyConflictError,
    NoSessionError,
    PartialCheckpointError,
    TargetMismatchError,
    UnsupportedLeafError,
)
from flax_partial.finalizing.abort import abort
from flax_partial.finalizing.finalize import finalize, finalize_async
from flax_partial.finalizing.status import status
from flax_partial.loading.catalog import latest, remove, steps
from flax_partial.loading.checkpoint import metadata
from flax_partial.loading.load import load
from flax_partial.loading.verify import verify
from flax_partial.options import SaveOptions
from flax_partial.reports import (
    CheckpointMetadata,
    LeafMetadata,
    PartStatus,
    SaveReport,
    SaveTimes,
    SessionStatus,
    VerifyReport,
)
from flax_partial.saving.describe import Slice
from flax_partial.saving.save import check, save, save_async
from flax_partial.sessions.handles import FinalizeHandle, SaveHandle

__all__ = [
    "CheckpointExistsError",
    "CheckpointInUseError",
    "CheckpointMetadata",
    "CorruptCheckpointError",
    "EmptyStateError",
    "FinalizeHandle",
    "ForkedProcessError",
    "IncompleteCheckpointError",
    "KeyConflictError",
    "LeafMetadata",
    "NoSessionError",
    "PartStatus",
    "PartialCheckpointError",
    "SaveHandle",
    "SaveOptions",
    "SaveReport",
    "SaveTimes",
    "SessionStatus",
    "Slice",
    "TargetMismatchError",
    "UnsupportedLeafError",
    "VerifyReport",
    "abort",
    "agree",
    "check",
    "finalize",
    "finalize_async",
    "latest",
    "load",
    "metadata",
    "remove",
    "save",
    "save_async",
    "status",
    "steps",
    "verify",
]
