"""Gives the tests of commands on object stores a shell."""

from shell import shell

__all__ = ["shell"]
