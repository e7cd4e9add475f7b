"""What ends a command with status 2."""


class WrongUseError(Exception):
    """The command was used wrongly: a path, or an option, is not what it should be."""
