"""Measures flax_partial beside its peers: `python -m benchmarks`, one module a scenario.

A scenario module has one function, `build(*, small: bool) -> Scenario`, and its name in
`__main__.SCENARIOS`. Figures of different runs are not comparable, ratios within one run are: the
contenders of a scenario take turns, round by round, in rotated order.
"""
