"""What a training run leaves on disk beside its arrays, for later runs and the command line.

Callbacks write and read it, the command line only reads it: `timeline` is the format of the
timeline's files, `completeness` what parts say about the step that they belong to, `directory` what
a run's directory may be, `liveness` the lock that a living run holds.
"""
