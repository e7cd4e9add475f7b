"""The commands of `flax-partial`, a module or package each; none imports another."""
