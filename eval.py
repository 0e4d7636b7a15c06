"""python eval.py --workdir runs/a [--tasks gsm8k] [--limit 200], or --model DIR: the same as
`zflora eval`.
"""

import sys

from zflora_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(command="eval"))
