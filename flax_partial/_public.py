"""The public names, which the package offers as its own."""

from flax_partial.distributed.agreement import agree
from flax_partial.errors import (
    CheckpointExistsError,
    CheckpointInUseError,
    CorruptCheckpointError,
    DeviceMemoryError,
    EmptyStateError,
    ForkedProcessError,
    IncompleteCheckpointError,
    KeyConflictError,
    NoSessionError,
    PartialCheckpointError,
    StoreAccessError,
    StoreError,
    TargetMismatchError,
    UnsupportedLeafError,
)
from flax_partial.finalizing.abort import abort
from flax_partial.finalizing.copy import copy
from flax_partial.finalizing.finalize import finalize, finalize_async
from flax_partial.finalizing.status import status
from flax_partial.format.slices import Slice
from flax_partial.leaf_types import register_leaf_type
from flax_partial.loading.arrangement import Stack
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
from flax_partial.saving.save import check, save, save_async, save_each_async
from flax_partial.sessions.handles import FinalizeHandle, SaveHandle
from flax_partial.storage.object_store import store_options
from flax_partial.storage.store_path import StorePath
from flax_partial.subtrees import subtree

__all__ = [
    "CheckpointExistsError",
    "CheckpointInUseError",
    "CheckpointMetadata",
    "CorruptCheckpointError",
    "DeviceMemoryError",
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
    "Stack",
    "StoreAccessError",
    "StoreError",
    "StorePath",
    "TargetMismatchError",
    "UnsupportedLeafError",
    "VerifyReport",
    "abort",
    "agree",
    "check",
    "copy",
    "finalize",
    "finalize_async",
    "latest",
    "load",
    "metadata",
    "register_leaf_type",
    "remove",
    "save",
    "save_async",
    "save_each_async",
    "status",
    "steps",
    "store_options",
    "subtree",
    "verify",
]
