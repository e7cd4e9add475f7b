"""What the public calls answer with: frozen records, no behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flax_partial.storage.store_path import AnyPath


@dataclass(frozen=True, slots=True)
class SaveTimes:
    """When one save did what, in seconds since the epoch.

    What lies between two of them is what the save did then, or waited for. `begun_at` is at or
    after `taken_at`; without it, each is at or after the one before. All come from one reading of
    the system's clock, which may be set while the save is under way.

    Attributes:
      called_at: `save` or `save_async` was called.
      entered_at: It was checked, and its leaves were claimed.
      admitted_at: Those of its bytes fitted into `max_inflight_bytes` that wait on no device.
      taken_at: Its arrays were safe from the caller: copied, viewed, or their transfer issued. Here
        `save_async` returns.
      begun_at: A worker was free to write it.
      ready_at: Its arrays were seen to be computed, and transferred where that was issued. JAX does
        not report it: writers check it between two pieces of work.
      copied_at: All of its data was in the host's memory.
      written_at: All of its data was in the part's file and, where durable, on the disk.
      committed_at: The part was committed.
    """

    called_at: float
    entered_at: float
    admitted_at: float
    taken_at: float
    begun_at: float
    ready_at: float
    copied_at: float
    written_at: float
    committed_at: float


@dataclass(frozen=True, slots=True)
class SaveReport:
    """One committed part.

    Attributes:
      path: The checkpoint that the part belongs to (without `.partial_save`).
      part: Name of the part's directory below `state/`.
      leaves: Number of leaves in it.
      bytes: Array data in it, in bytes.
      reused_bytes: The share of `bytes` that was not written, since an earlier checkpoint's files
        hold it.
      blocked_secs: Seconds for which the caller of `save` or `save_async` was held.
      budget_secs: The share of `blocked_secs` spent waiting for `max_inflight_bytes`.
      write_secs: Seconds from the start of writing until the part was committed.
      committed_at: When it was committed, in seconds since the epoch.
      times: When it did what, and so what it waited for.
      device_bytes: The share of `bytes` that was copied on its device, and saved from there.
    """

    path: AnyPath
    part: str
    leaves: int
    bytes: int
    reused_bytes: int
    blocked_secs: float
    budget_secs: float
    write_secs: float
    committed_at: float
    times: SaveTimes
    device_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PartStatus:
    """One committed part of an unfinished checkpoint.

    Attributes:
      name: Name of its directory below `state/`.
      process: Index of the process that wrote it.
      written_at: When its save began, in seconds since the epoch.
      leaves: Names of its leaves.
      bytes: Array data in it, in bytes.
      custom_metadata: What was passed with this save.
      training: What a training loop recorded of itself with this save.
    """

    name: str
    process: int
    written_at: float
    leaves: tuple[str, ...]
    bytes: int
    custom_metadata: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """What an unfinished checkpoint holds.

    Attributes:
      path: The checkpoint that finalize would make.
      parts: Its committed parts, oldest first.
      torn: Directories of saves that were never committed; they count for nothing.
      damaged: Committed parts whose table of contents is damaged; finalize refuses them.
      leaves: Names of all leaves saved so far, sorted; a replaced leaf counts once.
      bytes: Array data in the committed parts, in bytes, replaced leaves included.
      processes: Indices of the processes that have committed parts, ascending.
      custom_metadata: That of all parts, merged as finalize would merge it.
      training: What a training loop recorded of itself, merged likewise.
    """

    path: AnyPath
    parts: tuple[PartStatus, ...]
    torn: tuple[str, ...]
    damaged: tuple[str, ...]
    leaves: tuple[str, ...]
    bytes: int
    processes: tuple[int, ...]
    custom_metadata: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LeafMetadata:
    """One leaf of a checkpoint.

    Attributes:
      name: Keys of its path, joined with a dot.
      kind: `jax.Array`, `np.ndarray`, `np.generic`, `scalar`, `string`, `None`, `prng_key`, or an
        empty `dict`, `list`, `tuple` or `namedtuple`.
      shape: Global shape; `()` for what is not an array. A PRNG key's is that of the key array.
      dtype: Name of its dtype (`bfloat16`, `int64`, `key<fry>`, ...); empty where there is none.
      bytes: Size of its data when read, in bytes.
      sharding: The sharding it was saved with, in Orbax's terms; None where there was none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sharding: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class CheckpointMetadata:
    """What a finalized checkpoint holds, known without reading array data.

    Attributes:
      path: Where it is.
      leaves: Name of each leaf to its description, in the order of the tree.
      custom_metadata: That of all saves, merged.
      bytes: Array data of all leaves, in bytes.
      started_at: When its first part was written, in seconds since the epoch.
      committed_at: When it was finalized, in seconds since the epoch.
      parts: Number of saves it was made of; 0 where Orbax wrote it.
      training: What a training loop recorded of itself. The callbacks store `step`, `epoch`,
        `progress` (epochs done, steps of the epoch under way) and the states of `extras`; up to
        version 0.1 they did in `custom_metadata`.
      left_out: Items of a checkpoint of Orbax's that are not read: name -> why not.
    """

    path: AnyPath
    leaves: Mapping[str, LeafMetadata]
    custom_metadata: dict[str, Any]
    bytes: int
    started_at: float
    committed_at: float
    parts: int
    left_out: Mapping[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Outcome of reading and checking every byte of a checkpoint.

    Attributes:
      path: The checkpoint.
      leaves: Number of leaves checked.
      bytes: Array data read, in bytes.
      bad: Name of each leaf, or file, that is not what was written, to what is wrong with it.
    """

    path: AnyPath
    leaves: int
    bytes: int
    bad: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.bad
