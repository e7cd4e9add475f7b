"""What ends a command with status 2."""


class WrongUseError(Exception):
    """What was asked for makes no sense: a path, or an option, is not what it should be."""
