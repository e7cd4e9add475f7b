"""This process's records of unfinished checkpoints: saves in flight, their errors, their locks.

Saving registers here, finalizing reads here; neither imports the other.
"""
