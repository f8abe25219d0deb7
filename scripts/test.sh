#!/usr/bin/env bash
# The default test suite in .venv, one file of tests a core at a time. Arguments go to pytest, which then uses one core:
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
[ $# -gt 0 ] || set -- --numprocesses auto --maxprocesses 8 --dist loadfile
exec .venv/bin/python -m pytest "$@"
