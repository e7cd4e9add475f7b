"""Tables are decoded for the first time by several threads at once."""

from __future__ import annotations

import subprocess
import sys

# What msgspec prepares when it is first asked must be ready by then: else the process ends.
AT_ONCE = """
import sys, threading
from flax_partial.format import tables
from flax_partial.format.model import Leaf, Part

part = Part(0, 0, {}, (Leaf(("a",), "d", "None"),), 0, False)
encoded, barrier, decoded = tables.encode_part(part), threading.Barrier(16), []

def decode():
    barrier.wait()
    decoded.append(tables.decode_part(encoded, where="here").leaves == part.leaves)

sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=decode) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert decoded == [True] * 16, decoded
"""


def test_tables_are_decoded_by_many_threads_at_first() -> None:
    for _ in range(3):
        subprocess.run([sys.executable, "-c", AT_ONCE], check=True, timeout=500)
