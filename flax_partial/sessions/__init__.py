"""What this process knows of unfinished checkpoints: saves in flight, their errors, their locks.

Saving registers here, finalizing asks here; neither knows the other.
"""
