# engines.sh: have a Docker engine run on this machine, with gVisor's runtime; says nothing when it does.
#
# For the tests. Needs root or sudo once; what it starts without systemd goes on until the machine stops.
set -euo pipefail

config=/etc/docker/daemon.json
# ptrace needs nothing of the machine; where systrap or kvm work they are faster, and an operator would name them here.
runtime='{"path": "/usr/bin/runsc", "runtimeArgs": ["--platform=ptrace", "--network=none"]}'

fail() {
    echo "engines: $*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

answers() {
    as_root docker info --format '{{json .Runtimes}}' 2>/dev/null | grep -q '"runsc"'
}

wait_for_engine() {
    local _
    for _ in $(seq 30); do
        answers && return
        sleep 0.5
    done
    return 1
}

# Prints the configuration with our runtime in it; fails when it is there already.
configured() {
    python3 -I - "$config" "$runtime" <<'PYTHON'
import json, pathlib, sys
file, runtime = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
config = json.loads(file.read_text()) if file.exists() and file.read_text().strip() else {}
if "runsc" in config.get("runtimes", {}):
    sys.exit(1)
config.setdefault("runtimes", {})["runsc"] = runtime
print(json.dumps(config, indent=2))
PYTHON
}

answers && exit 0
if new=$(configured); then
    echo "engines: adding the runtime runsc to $config"
    as_root mkdir -p /etc/docker
    printf '%s\n' "$new" | as_root tee "$config" >/dev/null
fi
if as_root docker info >/dev/null 2>&1; then
    as_root sh -c 'kill -HUP "$(cat /var/run/docker.pid)"' # it reads its runtimes again
    wait_for_engine && exit 0
    fail "Docker runs and does not take the runtime runsc from $config; restart it"
fi
log=$(mktemp "${TMPDIR:-/tmp}/airlock-dockerd.XXXXXX")
echo "engines: starting Docker"
for _ in 1 2 3; do # one that is on its way out stands in the way of the next
    if [ -d /run/systemd/system ]; then
        as_root systemctl start docker >"$log" 2>&1
    else
        as_root sh -c "setsid nohup dockerd --log-level=warn >'$log' 2>&1 </dev/null &"
    fi
    wait_for_engine && exit 0
done
fail "Docker does not answer, or has no runtime runsc; it said: $(tail -n 1 "$log")"
