"""Gives the tests of the command line a shell."""

from shell import shell

__all__ = ["shell"]
