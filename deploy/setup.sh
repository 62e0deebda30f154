# setup.sh [tests]: make .venv with airlock and its locked dependencies in it, and install the system packages that lack.
#
# Says nothing when all is there. PYTHON=... picks the interpreter. With `tests`, what only the tests need is added.
set -euo pipefail

# What only the tests need of the system, as COMMAND:PACKAGE.
test_commands=(dockerd:docker.io docker:docker.io docker-compose:docker-compose runsc:runsc openssl:openssl
    chromium:chromium systemd-analyze:systemd)
test_files=('/usr/lib/postgresql/*/bin/initdb:postgresql' # likewise, what is on no PATH
    '/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf:fonts-dejavu-core')

# Sandboxes run under a uid of their own: what is installed here must be readable by everyone.
umask 022
# A caller's Python settings must not move the installation elsewhere.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

started=$SECONDS
stamp=.venv/airlock-setup # line 1: what .venv was made from; line 2: what was installed. Absent while work is going on.
log=

fail() {
    echo "setup: $*" >&2
    exit 1
}

# step NAME COMMAND...: its output is noise while all is well, so it goes to a log that is shown on failure.
step() {
    local name=$1
    shift
    echo "setup: $name"
    [ -n "$log" ] || log=$(mktemp "${TMPDIR:-/tmp}/airlock-setup.XXXXXX") || fail "cannot write to ${TMPDIR:-/tmp}"
    if ! ("$@") >"$log" 2>&1 </dev/null; then
        echo "setup: step '$name' failed (see $log); it ended with:" >&2
        { grep -v '^WARNING' "$log" || true; } | tail -n 15 | sed 's/^/    /' >&2
        log= # keep it
        exit 1
    fi
}

find_python() {
    local candidate candidates=(/usr/bin/python3 python3.14 python3.13 python3.12 python3.11 python3)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        candidate=$(command -v "$candidate") || continue
        if "$candidate" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer, and ${PYTHON:-what is installed} is not; name one with 'make PYTHON=/path/to/python'"
}

# Prints the packages that lack. What is wanted is asked for itself, so that other systems and other Pythons pass too.
missing_packages() {
    local entry
    "$python" -I -c 'import ctypes; ctypes.CDLL("libseccomp.so.2")' 2>/dev/null || echo libseccomp2
    if [ -z "$venv_is_good" ] && ! "$python" -I -c 'import ensurepip' 2>/dev/null; then
        case $(readlink -f "$python") in
            /usr/bin/*) echo "python${version%.*}-venv" ;;
            *) fail "$python has no ensurepip, so it cannot make a virtual environment; name another with 'make PYTHON=...'" ;;
        esac
    fi
    for entry in ${test_commands[@]+"${test_commands[@]}"}; do
        command -v "${entry%%:*}" >/dev/null || echo "${entry#*:}"
    done
    for entry in ${test_files[@]+"${test_files[@]}"}; do
        compgen -G "${entry%%:*}" >/dev/null || echo "${entry#*:}"
    done
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# 9>&-: a service that apt starts must not inherit our lock.
apt() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" 9>&-
}

# Debian makes and starts a server of its own with the package, unless it is told not to. Tests start theirs.
no_postgresql_cluster() {
    printf 'create_main_cluster = false\n' | as_root tee /etc/postgresql-common/createcluster.d/airlock.conf >/dev/null
}

install_packages() {
    case " $* " in *" postgresql "*) as_root mkdir -p /etc/postgresql-common/createcluster.d && no_postgresql_cluster ;; esac
    # The package lists of a fresh machine are absent or old, but where they serve, updating them is the slow part.
    apt install -y --no-install-recommends "$@" || { apt update && apt install -y --no-install-recommends "$@"; }
}

lacks_promtool() {
    [ "$tests" ] && [ ! -x .venv/bin/promtool ] && ! command -v promtool >/dev/null
}

# The one file that tests need of Debian's `prometheus`: with the rest come 330 MB and a server that is started.
fetch_promtool() {
    local folder=.venv/fetched
    rm -rf "$folder" && mkdir "$folder"
    (cd "$folder" && { apt download prometheus || { apt update && apt download prometheus; }; })
    dpkg-deb --fsys-tarfile "$folder"/prometheus_*.deb | tar -x -C "$folder" ./usr/bin/promtool
    mv "$folder/usr/bin/promtool" .venv/bin/ && rm -rf "$folder"
}

make_venv() {
    rm -rf .venv && "$python" -I -m venv .venv
}

pip() {
    .venv/bin/python -I -m pip --quiet "$@" --progress-bar off
}

cd "$(dirname "$0")/.."

# Two at once wait for one another. The lock is on this file, so that it survives the remaking of .venv.
exec 9<deploy/setup.sh
flock --nonblock 9 || { echo "setup: waiting for another setup of this folder" && flock 9; }

trap '[ -z "$log" ] || rm -f "$log"' EXIT
trap 'echo "setup: interrupted; the next run starts over where it has to" >&2; exit 130' INT TERM

tests=
if [ "${1:-}" = tests ]; then tests=yes; else test_commands=() test_files=(); fi
python=$(find_python)
version=$("$python" -I -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
made_from="$python $version $PWD" # a moved or copied .venv has the old path in its scripts
installed=$(cat requirements.lock pyproject.toml | sha256sum)
{ read -r was_made_from && read -r was_installed; } 2>/dev/null <"$stamp" || was_made_from='' was_installed=''

venv_is_good=
[ "$was_made_from" = "$made_from" ] && [ -x .venv/bin/airlock ] && .venv/bin/python -I -c '' 2>/dev/null && venv_is_good=yes

missing=$(missing_packages)
read -r -d '' -a missing <<<"$missing" || true # one array entry a package
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || fail "needs ${missing[*]}, and there is no apt-get here: install it by other means"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null ||
        fail "needs root or sudo to install ${missing[*]}: have 'apt-get install ${missing[*]}' run once, then try again"
    step "system packages: ${missing[*]}" install_packages "${missing[@]}"
fi

current=
[ "$venv_is_good" ] && [ "$was_installed" = "$installed" ] && current=yes
[ "$current" ] && ! lacks_promtool && exit 0

[ -w . ] || fail "cannot write to $PWD"
if [ -z "$current" ]; then
    rm -f "$stamp"
    [ "$venv_is_good" ] || step "virtual environment (Python $version)" make_venv
    step "locked dependencies (about 150 MB the first time)" pip install --require-hashes --only-binary :all: -r requirements.lock
    step "airlock itself" pip install --no-index --no-deps --no-build-isolation --editable .
    printf '%s\n' "$made_from" "$installed" >"$stamp"
fi
! lacks_promtool || step "promtool (19 MB)" fetch_promtool
echo "setup: done in $((SECONDS - started)) s"
