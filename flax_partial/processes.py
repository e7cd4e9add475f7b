"""Which process this is, among those that train together under `jax.distributed`.

JAX has no public access to its coordination service. All use of the private one stands here; should
it move, this module is what to change.
"""

from jax._src import distributed


def index() -> int:
    """Index of this process; 0 where `jax.distributed` was not initialized. Starts no backend."""
    return distributed.global_state.process_id or 0


def count() -> int:
    """Number of processes; 1 where `jax.distributed` was not initialized."""
    return distributed.global_state.num_processes or 1
