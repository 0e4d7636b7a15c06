"""zFLoRA in JAX: adapters that widen a language model's streams, trained next to the frozen base
and fused into an ordinary, slightly wider model.

The papers' method sections (arXiv 2510.25784 and 2511.00050) could not be obtained; the methods
here are this project's reconstruction. Names are loaded when they are first used, from the places
that `__init__.pyi` lists: `import zflora_jax` alone imports no deep-learning library.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
