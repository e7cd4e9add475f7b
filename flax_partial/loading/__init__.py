"""Reading finalized checkpoints, ours and Orbax's: load, metadata, verify, steps.

Others use the public calls, and `checkpoint` to read more than one leaf at a time.
"""
