"""The command line, `flax-partial`: look into checkpoints without writing code.

Nothing of the package imports it. `main` lists the commands. Each is a module or a package of
`commands` with `add`, which declares its arguments, and `run`, which gathers its result as data,
makes text and JSON of that, and returns whether it found a problem. They write through `output`:
results to standard output, notes, questions and bars to standard error.

No command starts a device of JAX's: training may hold it.
"""
