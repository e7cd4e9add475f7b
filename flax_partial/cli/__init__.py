"""The command line, `flax-partial`: look into checkpoints without writing code.

Nothing of the package imports it. Each command is a module or package of `commands` with `add`,
which declares it, and a function that gathers what is to be said as data, from which both the text
and the JSON are made; `main` lists the commands. What they say goes through `output`: tables and
lines to standard output, where other programs read them, notes, questions and bars to standard
error.

No command starts a device of JAX's: training may hold it.
"""
