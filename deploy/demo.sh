# demo.sh: a language model finds a needle in ten million characters that it never reads.
#
# SCRIPTED=1 replays written replies instead of asking a model: the same path in seconds, without the weights.
# SEED=N hides another number elsewhere. AIRLOCK_HOME is the data folder, as everywhere.
set -euo pipefail
cd "$(dirname "$0")/.."

airlock=.venv/bin/airlock
model=local:qwen2.5-coder-1.5b
[ -z "${SCRIPTED:-}" ] || model=scripted:tests/examples/demo.scripted.yaml

work=$(mktemp -d "${TMPDIR:-/tmp}/airlock-demo.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'echo "demo: interrupted" >&2; exit 130' INT TERM

# part NAME COMMAND...: one part of the demo, with the time it took.
part() {
    local name=$1 started ms
    shift
    printf '\n== %s\n' "$name"
    started=$(date +%s%N)
    "$@" || { echo "demo: step '$name' failed" >&2 && exit 1; }
    ms=$((($(date +%s%N) - started) / 1000000))
    printf -- '-- %d.%03d s\n' $((ms / 1000)) $((ms % 1000))
}

hide() {
    .venv/bin/python -I tests/examples/make_haystack.py "$work/haystack.txt" --seed "${SEED:-7}" >"$work/number"
}

ask() {
    "$airlock" run "What is the magic number?" --context "$work/haystack.txt" \
        --model "$model" --sub-model "$model" --timeout 300 --json >"$work/result.json"
}

# One field of the result, as text.
field() {
    .venv/bin/python -I -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$work/result.json" "$1"
}

check() {
    local answer number
    answer=$(field answer) && number=$(cat "$work/number") || return
    echo "answer:  $answer"
    echo "hidden:  $number"
    echo "cost:    $(field cost_usd) USD"
    case $answer in
        *"$number"*) echo "right: the model found the needle" ;;
        *) echo "wrong: that is not the number that was hidden" >&2 && return 1 ;;
    esac
}

part "hide a number in ten million characters" hide
[ "${SCRIPTED:-}" ] || part "fetch the weights of the model (1.1 GB, once)" "$airlock" models pull
part "ask $model" ask
part "the journal of this query" "$airlock" audit show "$(field query_id)"
part "is it right?" check
