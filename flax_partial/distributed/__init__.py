"""Which process this is, and how several agree on an outcome, through JAX's own service.

Other rooms use `agreement`; `jax_service` holds what JAX keeps private.
"""
