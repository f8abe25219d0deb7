#!/usr/bin/env bash
# Trains a two-tower recommender on MovieLens-100K, tests it beside a popularity baseline and recommends films.
# Ten minutes at most on two cores without a GPU; a second run reuses what the first one installed and cached.
#
#   scripts/quickstart.sh [--data DIR] [--run-dir DIR] [-- OPTION ...]
#
#   --data DIR      a copy of MovieLens-100K that you have (what ml-100k.zip unpacks to); else it is fetched
#   --run-dir DIR   where checkpoint, config, metrics and predictions go (default: runs/ml100k)
#   -- OPTION ...   further options of "lightning-rec fit", for example: -- --trainer.max_epochs 3
#
# Environment: TORCH_SPEC chooses torch (see scripts/_environment.sh), LIGHTNING_REC_CACHE the cache folder.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }
fail() {
    printf '%s\n' "$*" >&2
    exit 2
}

here=$PWD data=() run=""
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --data | --run-dir)
        [ $# -ge 2 ] || fail "$1 wants a folder after it; --help tells more."
        [ "$1" = --data ] && data=(--data "$2")
        [ "$1" = --run-dir ] && run=$2
        shift 2
        ;;
    --)
        shift
        break
        ;;
    *) fail "The option $1 is not known; --help lists those that are." ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Folders that were named are meant as seen from where the script was called.
case $run in
"") run=runs/ml100k ;;
/*) ;;
*) run=$here/$run ;;
esac
if [ ${#data[@]} -gt 0 ]; then
    case ${data[1]} in
    /*) ;;
    *) data[1]=$here/${data[1]} ;;
    esac
fi
baseline=$run-popularity

step() { printf '\n== %s\n' "$*"; }

scripts/_environment.sh
python=.venv/bin/python lightning_rec=.venv/bin/lightning-rec

step "MovieLens-100K"
folder=$("$python" scripts/fetch_movielens.py ${data[@]+"${data[@]}"} | tail -n 1)
echo "$folder"

data_options=(--data.path "$folder")
# What follows a fit starts from the config that the run saved beside its checkpoint.
fitted=(--ckpt_path best --trainer.default_root_dir "$run")

step "Training: configs/video/ml100k.yaml"
"$lightning_rec" fit --config configs/video/ml100k.yaml "${data_options[@]}" --trainer.default_root_dir "$run" "$@"
step "Testing the best checkpoint"
"$lightning_rec" test "${fitted[@]}"
step "The baseline: configs/video/ml100k_popularity.yaml"
"$lightning_rec" test --config configs/video/ml100k_popularity.yaml "${data_options[@]}" \
    --trainer.default_root_dir "$baseline"
step "Recommending to every user"
"$lightning_rec" predict "${fitted[@]}"

step "Result"
"$python" scripts/quickstart_report.py --data "$folder" --run "$run" --baseline "$baseline"
