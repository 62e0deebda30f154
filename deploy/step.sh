# step.sh NAME COMMAND...: run one step, in one line when it passes; when it fails, show what it printed and name it.
set -uo pipefail

name=$1
shift
log=$(mktemp "${TMPDIR:-/tmp}/airlock-step.XXXXXX") || exit 1
trap 'rm -f "$log"' EXIT

if "$@" >"$log" 2>&1; then
    echo "ok: $name"
else
    cat "$log" >&2
    echo "step '$name' failed" >&2
    exit 1
fi
