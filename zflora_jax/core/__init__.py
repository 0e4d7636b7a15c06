"""Settings, trees, shapes, and what a model is made of: what every other package may build on.

Imports nothing else of the project; the settings import no jax.
"""
