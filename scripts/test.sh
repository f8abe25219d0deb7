#!/usr/bin/env bash
# The default test suite in .venv. Arguments go to pytest:
#   scripts/test.sh                     all tests but those marked slow
#   scripts/test.sh -m slow             the slow ones
#   scripts/test.sh tests/data -k split
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
-h | --help)
    sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

scripts/_environment.sh test
exec .venv/bin/python -m pytest "$@"
