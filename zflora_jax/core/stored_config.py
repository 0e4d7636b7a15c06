"""`from_dict` under its former name."""

from zflora_jax.core.fields import from_dict as from_file

__all__ = ["from_file"]
