#!/bin/sh
# install.sh VENV: MLflow's server in an environment of its own. Says nothing and does nothing where it is there already.
# mlflow's wheel holds everything; it is installed beside its dependencies rather than through them, because it asks for
# mlflow-skinny and mlflow-tracing of the same version, which hold parts of the same files again.
set -eu
here=$(dirname "$(readlink -f "$0")")
venv=$1
stamp="$venv/.installed"
[ -f "$stamp" ] && cmp -s "$stamp" "$here/requirements.txt" && exit 0
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install -q --disable-pip-version-check -r "$here/requirements.txt"
"$venv/bin/pip" install -q --disable-pip-version-check --no-deps mlflow==3.18.0
"$venv/bin/mlflow" --version > /dev/null
cp "$here/requirements.txt" "$stamp"
