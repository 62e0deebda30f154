# lock.sh: write requirements.lock from pyproject.toml: all extras and the dev group, for every platform, with hashes.
#
# Versions that are already locked stay as they are unless pyproject.toml rules them out, or UPGRADE=1.
set -euo pipefail
cd "$(dirname "$0")/.."

# The resolver is needed here alone, so it gets an environment of its own that is thrown away.
tools=$(mktemp -d "${TMPDIR:-/tmp}/airlock-lock.XXXXXX")
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-/usr/bin/python3}" -I -m venv "$tools"
"$tools/bin/python" -I -m pip --quiet --disable-pip-version-check install uv==0.13.9 2>"$tools/log" ||
    { cat "$tools/log" >&2 && echo "lock: cannot install uv" >&2 && exit 1; }

"$tools/bin/uv" pip compile pyproject.toml --quiet ${UPGRADE:+--upgrade} \
    --all-extras --group dev --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-emit-find-links --annotation-style line --custom-compile-command 'make lock' \
    --output-file requirements.lock
echo "lock: requirements.lock pins $(grep -c '==' requirements.lock) packages"
