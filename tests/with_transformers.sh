#!/usr/bin/env bash
# The tests with another version of transformers, in an environment of its own:
#
#     tests/with_transformers.sh 5.20.0 tests/conformance -n 2
#
# Arguments behind the version go to pytest; without any, the conformance tests run. CIRCUITVISION_ENVIRONMENTS names a folder that keeps
# environments for the next run (a temporary one otherwise).
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 VERSION [pytest arguments]"; exit 2; }
cd "$(dirname "$0")/.."
version="$1"; shift
folder="${CIRCUITVISION_ENVIRONMENTS:-$(mktemp -d)}"
[ -n "${CIRCUITVISION_ENVIRONMENTS:-}" ] || trap 'rm -rf "$folder"' EXIT
environment="$folder/transformers-$version"
if [ ! -x "$environment/bin/python" ]; then
    mkdir -p "$folder"
    python3 -m venv "$environment"
    sed '/^transformers==/d' constraints.txt > "$folder/constraints.txt"
    "$environment/bin/pip" install --quiet torch==2.13.0
    "$environment/bin/pip" install --quiet -c "$folder/constraints.txt" -e ".[test]" "transformers==$version"
fi
[ $# -ge 1 ] || set -- tests/conformance
"$environment/bin/python" -c "import transformers; print('transformers', transformers.__version__)"
PYTHONPATH="$PWD" "$environment/bin/python" -m pytest "$@"
