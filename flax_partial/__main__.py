"""`python -m flax_partial`: the same as `flax-partial`."""

from flax_partial.cli.main import run

if __name__ == "__main__":
    run()
