"""One save, from a caller's state to a committed part, top to bottom.

Others use `save` only. It reads: check, claim, describe, snapshot, write, commit.
"""
