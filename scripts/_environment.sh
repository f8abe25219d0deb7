#!/usr/bin/env bash
# Makes or updates .venv and installs the package into it. The other scripts call this one.
#
#   scripts/_environment.sh [EXTRA ...]      extras of pyproject.toml, for example: test lint
#
# TORCH_SPEC chooses torch: what pip install shall be given, options included.
#   TORCH_SPEC="torch==2.12.0 --index-url https://download.pytorch.org/whl/cu126" scripts/_environment.sh
# PYTHON chooses the interpreter that makes .venv (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
log=$venv/install.log
stamp=$venv/installed.txt # line 1: what was installed; line 2: which torch; line 3: the extras
cpu_torch="torch==2.13.0" # the release that the figures in the README were measured with
cpu_index="https://download.pytorch.org/whl/cpu"

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "No Python 3.11 or newer was found (tried: ${PYTHON:-python3, python3.13, python3.12, python3.11})." \
        "Install one, or name it: PYTHON=/path/to/python3.12 $0"
    exit 1
}

# Is the index of CPU builds reachable? Asked for 4 seconds at most, name look-up included.
cpu_index_answers() {
    "$venv/bin/python" - "$cpu_index/torch/" <<'PY' 2>/dev/null
import os, sys, threading, urllib.request

def ask() -> None:
    urllib.request.urlopen(sys.argv[1], timeout=4).close()
    os._exit(0)

threading.excepthook = lambda _: os._exit(1)
threading.Thread(target=ask, daemon=True).start()
threading.Event().wait(4)
os._exit(1)
PY
}

# pip install, told in a line or two instead of some hundreds; the whole of it goes to the log.
pip_install() {
    local title=$1 count=0 line
    shift
    say "$title"
    if ! "$venv/bin/python" -m pip install --no-input --disable-pip-version-check "$@" </dev/null 2>&1 |
        while IFS= read -r line; do
            printf '%s\n' "$line" >>"$log"
            case $line in
            "Collecting "*)
                count=$((count + 1))
                line=${line#Collecting }
                if [ -t 2 ]; then
                    printf '\r\033[K  %d packages found: %s' "$count" "${line%% *}" >&2
                elif [ $((count % 25)) -eq 0 ]; then
                    say "  $count packages found"
                fi
                ;;
            "Installing collected packages: "*)
                if [ -t 2 ]; then printf '\r\033[K' >&2; fi
                say "  unpacking (a minute or two for the large ones)"
                ;;
            esac
        done; then
        say "" "pip could not install this. The end of $log says:"
        tail -n 15 "$log" >&2
        exit 1
    fi
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "Making $venv with $("$python" --version)"
    rm -rf "$venv"
    if ! "$python" -m venv "$venv"; then
        say "$python -m venv failed: on Debian and Ubuntu, install the package python3-venv."
        exit 1
    fi
fi

if [ -n "${TORCH_SPEC:-}" ]; then
    torch=$TORCH_SPEC
elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    torch=torch
else
    torch=$cpu_torch
fi

wanted=$("$venv/bin/python" - "$torch" "$PWD" <<'PY'
import hashlib, pathlib, sys
print(hashlib.sha256(pathlib.Path("pyproject.toml").read_bytes() + repr(sys.argv[1:]).encode()).hexdigest())
PY
)
had="" had_torch="" had_extras=""
if [ -f "$stamp" ]; then
    { read -r had && read -r had_torch && read -r had_extras; } <"$stamp" || true
fi
extras=$had_extras missing=""
for extra in "$@"; do
    case " $extras " in
    *" $extra "*) ;;
    *) extras="${extras:+$extras }$extra" missing=yes ;;
    esac
done
if [ "$had" = "$wanted" ] && [ -z "$missing" ]; then
    exit 0
fi

: >"$log"
rm -f "$stamp"
if [ -n "$had_torch" ] && [ "$had_torch" != "$torch" ]; then
    # pip would take the build that is there for the one that is asked for: both satisfy "torch".
    "$venv/bin/python" -m pip uninstall -y torch >>"$log" 2>&1
fi
read -ra torch_arguments <<<"$torch"
if [ "$torch" = "$cpu_torch" ] && [ "$(uname -s)" = Linux ] &&
    ! "$venv/bin/python" -m pip show -qq torch >/dev/null 2>&1 && cpu_index_answers; then
    torch_arguments+=(--index-url "$cpu_index") # without CUDA's gigabytes
fi
pip_install "Installing ${torch_arguments[*]}" "${torch_arguments[@]}"
pip_install "Installing lightning_rec${extras:+ with what it needs for: $extras}" -e ".${extras:+[${extras// /,}]}"
printf '%s\n%s\n%s\n' "$wanted" "$torch" "$extras" >"$stamp"
say "Installed in $venv"
