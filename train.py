"""python train.py --config configs/quickstart.py --workdir runs/a [--set train.steps=50 ...]: the
same as `zflora train`.
"""

import sys

from zflora_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(command="train"))
