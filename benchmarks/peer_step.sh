#!/usr/bin/env bash
# Installs google-tunix into an environment in DIR (default build/peer), then compares train steps: benchmarks/peer_step.py.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:-build/peer}
if [ ! -e "$dir/.done" ]; then
  "${PYTHON:-python3.11}" -m venv "$dir"
  "$dir/bin/pip" install -q lazy_loader matplotlib google-tunix==0.1.7 qwix==0.1.8 'jax[tpu]==0.10.2'
  touch "$dir/.done"
fi
JAX_PLATFORMS=cpu PYTHONPATH=. exec "$dir/bin/python" benchmarks/peer_step.py
