"""`python -m zflora_jax.cli`: the command `zflora`."""

import sys

from zflora_jax.cli.main import main

sys.exit(main())
