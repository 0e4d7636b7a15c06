"""Studies of the methods with `zflora_jax`: comparisons over seeds, their statistics and pages.

They use the public names of the package alone.
"""
