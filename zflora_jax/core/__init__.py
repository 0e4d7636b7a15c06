"""Settings, trees, shapes and the parts of a model, which every other package may import.

This package imports no other package of the project; its settings import no jax.
"""
