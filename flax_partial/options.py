"""How a save is written."""

from dataclasses import dataclass
from typing import Literal, get_args

Compression = Literal["zstd", "blosc"]
"""Codecs of chunks."""

_LEAST_BYTES = {"max_inflight_bytes": 1, "max_device_bytes": 0, "chunk_bytes": 1}
COMPRESSIONS = (None, *get_args(Compression))


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """How a save is written; the defaults are the safe ones.

    Attributes:
      durable: Whether data, table of contents and directories are fsynced before a save returns.
        Without it a saved part outlives the death of the process; a power cut, or a crash of the
        system, it outlives only if the system has written everything by then, which takes about
        half a minute. Otherwise the part is gone, as if it had never been saved, or array data of
        it is missing. A checkpoint that was finalized from it is durable as far as `finalize`
        wrote it, so it is there, but may lack that array data. Other data is never returned:
        `finalize`, `load` and `verify` report what is missing (`CorruptCheckpointError`), unless
        `checksum` is off too.
      checksum: Whether an xxh3-128 digest of every chunk is stored. Without it damage to array data
        goes unnoticed, and replicated leaves that several processes save cannot be compared.
      compression: `"zstd"`, `"blosc"`, or None. Blosc (LZ4 over shuffled bits) takes half the time
        of zstd, and makes weights smaller; zstd suits text and other bytes that are no numbers.
      max_inflight_bytes: Host memory, in bytes, that snapshots waiting to be written may hold in
        this process. Past it copies wait on their devices, and `save_async` waits where it could
        make none. A state that is larger by itself waits until it is alone. None sets no bound.
      max_device_bytes: Memory of each device, in bytes, that copies of what is being saved may hold
        until they are on the host; a step that donates its arrays then waits for no transfer. What
        has no room is transferred from where it is. 0 makes no copies. None is for what training
        leaves: the device's limit, less the most that was in use over at least two whole steps,
        less a reserve of a sixteenth; before that, and where the device does not report its
        memory, nothing.
      chunk_bytes: Wanted size of a chunk, in bytes: the unit of digests and of partial reads.
      share_replicas: Whether all processes that hold replicas of an array write it together, each
        its share. All of them have to save it then, alike: a share that is missing is told by
        finalize. Otherwise the process that has the first replica writes it, and only that one
        has to save it. None: the callback shares, where all processes come, `save` does not.
    """

    durable: bool = True
    checksum: bool = True
    compression: str | None = None
    max_inflight_bytes: int | None = None
    max_device_bytes: int | None = None
    chunk_bytes: int = 2 << 20
    share_replicas: bool | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value that no save could honour."""
        if self.compression not in COMPRESSIONS:
            raise ValueError(
                "compression is None, 'zstd' or 'blosc', each at a level of its own, not "
                f"{self.compression!r}"
            )
        for name, least in _LEAST_BYTES.items():
            value = getattr(self, name)
            if value is None and name != "chunk_bytes":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                what = "a positive number of bytes" if least else "a number of bytes, 0 or more"
                raise ValueError(f"{name} is {what}, not {value!r}")
