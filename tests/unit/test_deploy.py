"""What is shipped to run the service with: each file is held to what reads it, and to the code that it speaks of."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import cli, settings
from orchestrator.core.policy import PAYLOADS
from orchestrator.named_policy import load_policy
from orchestrator.server.app import make_app
from orchestrator.server.metrics import Metrics
from tests.command import PROJECT

DEPLOY = PROJECT / "deploy"
EXAMPLES = PROJECT / "tests" / "examples" / "alerts.yaml"  # of alerts, with what each is to say
PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "process_max_fds"}


def text(name: str) -> str:
    return (DEPLOY / name).read_text()


def which(program: str) -> str:
    found = shutil.which(program)
    assert found, f"{program} is not installed"
    return found


def promtool(*arguments: object) -> str:
    """What it says. The one that `setup.sh tests` fetched, or the system's."""
    mine = PROJECT / ".venv" / "bin" / "promtool"
    program = str(mine) if mine.exists() else which("promtool")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def told() -> set[str]:
    """Names of all samples that the service gives, with what Prometheus calls a histogram's."""
    metrics = Metrics()
    names: set[str] = set()
    for family in metrics.registry.collect():
        total = {"counter": "_total", "info": "_info"}.get(family.type, "")
        names.add(family.name + total)
    return names


def named(expressions: str) -> set[str]:
    found = set(re.findall(r"\b(?:airlock|process)_[a-z_]+", expressions))
    return {name.removesuffix("_bucket") for name in found}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(text("alerts.yaml"))["groups"] for rule in group["rules"]]


def expressions(board: dict[str, Any]) -> str:
    return "\n".join(target["expr"] for panel in board["panels"] for target in panel.get("targets", ()))


def test_the_board_shows_exactly_what_is_there():
    board = json.loads(text("grafana.json"))
    shown = named(expressions(board))
    assert shown == {name for name in told() if name.startswith("airlock_")} | PROCESS
    assert told() >= PROCESS
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


def test_labels_on_the_board_and_in_alerts_are_those_of_the_metrics():
    metrics = Metrics()
    labels = {"le", "job", "instance"}
    for collector in list(metrics.registry._collector_to_names):
        labels |= set(getattr(collector, "_labelnames", ()))
    labels |= {"version"}
    asked = expressions(json.loads(text("grafana.json"))) + text("alerts.yaml")
    used = {name.strip() for group in re.findall(r"by \(([^)]*)\)", asked) for name in group.split(",")}
    used |= set(re.findall(r"[{,]\s*([a-z]+)=", asked))
    assert used <= labels


def test_panels_do_not_lie_on_each_other():
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(text("grafana.json"))["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_alerts_are_of_metrics_that_are_there():
    assert named("\n".join(rule["expr"] for rule in rules())) <= told()
    known = Metrics().registry
    for status in re.findall(r'status="(\w+)"', text("alerts.yaml")):
        assert known.get_sample_value("airlock_queries_total", {"status": status}) == 0
    for outcome in re.findall(r'outcome="(\w+)"', text("alerts.yaml")):
        assert known.get_sample_value("airlock_sub_calls_total", {"outcome": outcome}) == 0


def test_prometheus_takes_the_configuration(tmp_path: Path):
    (tmp_path / "alerts.yaml").write_text(text("alerts.yaml"))
    (tmp_path / "airlock.key").write_text("x")
    config = tmp_path / "prometheus.yaml"
    config.write_text(text("prometheus.yaml").replace("/etc/prometheus/airlock.key", "airlock.key"))
    assert "6 rules found" in promtool("check", "config", config)


def test_alerts_fire_at_what_is_broken_and_at_nothing_else():
    promtool("test", "rules", EXAMPLES)
    cases = [case for test in yaml.safe_load(EXAMPLES.read_text())["tests"] for case in test["alert_rule_test"]]
    for silent in (True, False):  # each is seen to fire, and to be silent
        seen = {case["alertname"] for case in cases if (not case["exp_alerts"]) == silent}
        assert seen == {rule["alert"] for rule in rules()}


def test_every_alert_says_how_bad_it_is_and_what_to_do():
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]


def test_prometheus_asks_for_a_page_that_is_there():
    (job,) = yaml.safe_load(text("prometheus.yaml"))["scrape_configs"]
    paths = {getattr(route, "path", None) for route in make_app(None).routes}  # type: ignore[arg-type]  never asked
    openapi = make_app(None).openapi()["paths"]  # type: ignore[arg-type]
    assert job["metrics_path"] in openapi | dict.fromkeys(paths)
    assert f"http://127.0.0.1:8080{'/healthz'}" in text("Dockerfile")
    assert {"/healthz", "/readyz", "/metrics"} <= openapi.keys()


def options_of(arguments: list[str]) -> dict[str, Any]:
    """As the command line reads them. Raises click's UsageError for what it does not know."""
    return cli.app.commands["serve"].make_context("serve", arguments).params  # type: ignore[attr-defined]


def variables() -> dict[str, str]:
    lines = [line.removeprefix("#") for line in text("airlock.env.example").splitlines()]
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Z_]+=", line))


def test_variables_of_the_example_are_read_by_somebody():
    source = Path(settings.__file__).read_text()
    for name in variables().keys() - {"AIRLOCK_OPTIONS"}:
        known = name in source or (name == "OTEL_EXPORTER_OTLP_ENDPOINT" and "OTEL_EXPORTER_OTLP_" in source)
        assert known, name
    given = options_of(shlex.split(variables()["AIRLOCK_OPTIONS"]))
    assert given["backend"] == "gvisor"
    assert not any(line.startswith(("export", " ")) for line in text("airlock.env.example").splitlines())


@pytest.fixture
def composed(tmp_path: Path) -> dict[str, Any]:
    """The compose file as docker-compose reads it."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    shutil.copy(DEPLOY / "airlock.env.example", tmp_path / "deploy" / "airlock.env")
    (tmp_path / "deploy" / "postgres.password").write_text("x")
    command = [which("docker-compose"), "-f", "deploy/compose.yaml", "config"]
    env = {"PATH": os.environ["PATH"], "DOCKER_GID": "999"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    refused = subprocess.run(
        command, cwd=tmp_path, env={"PATH": env["PATH"]}, capture_output=True, text=True, timeout=60
    )
    assert "DOCKER_GID" in refused.stderr  # rather than a service that cannot start a sandbox
    return yaml.safe_load(done.stdout)


def test_compose(composed: dict[str, Any]):
    airlock, postgres = composed["services"]["airlock"], composed["services"]["postgres"]
    serve, *arguments = airlock["command"]
    assert serve == "serve"
    given = options_of(arguments)
    assert (given["host"], given["insecure_http"], given["backend"]) == ("0.0.0.0", True, "gvisor")  # noqa: S104
    assert all(str(port).startswith("127.0.0.1:") for port in airlock["ports"])
    assert "ports" not in postgres
    assert composed["networks"]["back"]["internal"] is True
    for service in (airlock, postgres):
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service.get("privileged")
    assert airlock["read_only"] is True
    seconds = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", airlock["stop_grace_period"])
    assert seconds
    grace = 60 * int(seconds[1] or 0) + int(seconds[2] or 0)
    assert grace > settings.ServerSettings().drain_s + 30


def test_what_is_shipped_keeps_the_answers_that_it_serves(composed: dict[str, Any]):
    """A policy that keeps no texts has a service whose answers nobody can read."""
    for arguments in (composed["services"]["airlock"]["command"][1:], shlex.split(variables()["AIRLOCK_OPTIONS"])):
        assert load_policy(options_of(arguments)["policy"]).audit.payloads == PAYLOADS


def test_nothing_that_is_secret_is_in_a_file_that_is_shipped():
    for file in DEPLOY.iterdir():
        found = re.findall(r"(?m)^[ \t#]*[A-Z_]*(?:KEY|PASSWORD|SECRET|TOKEN)[A-Z_]*[=:][ \t]*(\S+)", file.read_text())
        assert not [value for value in found if not value.startswith(("/run/secrets/", "#"))], file.name
    ignored = (PROJECT / ".gitignore").read_text().splitlines()
    assert {"/deploy/airlock.env", "/deploy/postgres.password"} <= set(ignored)


def test_the_image():
    lines = re.sub(r"\\\n", " ", text("Dockerfile"))
    base = re.search(r"(?m)^ARG PYTHON=(\S+@sha256:[0-9a-f]{64})$", lines)
    assert base
    assert f"ARG PYTHON={base[1]}" in (PROJECT / "sandbox_images" / "Dockerfile").read_text()  # one base, one digest
    assert set(re.findall(r"(?m)^FROM (\S+)", lines)) == {"${PYTHON}"}
    user = re.findall(r"(?m)^USER (\d+):(\d+)$", lines)
    assert user
    assert int(user[-1][0]) > 0
    assert re.search(r'(?m)^CMD \["serve"\]$', lines)  # on its own address alone: what opens it is said elsewhere
    extras = re.search(r"ARG EXTRAS=(\S+)", lines)
    assert extras
    project = (PROJECT / "pyproject.toml").read_text()
    assert all(re.search(rf"(?m)^{extra} = \[", project) for extra in extras[1].split(","))
    kept = (PROJECT / ".dockerignore").read_text().splitlines()
    for source in re.findall(r"(?m)^COPY (?!--from)(.+) \S+$", lines):
        for name in source.split():
            assert (PROJECT / name).exists()
            assert f"!{name}" in kept


def test_the_unit(tmp_path: Path):
    unit = text("airlock.service")
    assert re.search(r"(?m)^ExecStart=/opt/airlock/deploy/delegated.sh /opt/airlock/.venv/bin/airlock serve ", unit)
    here = tmp_path / "airlock.service"
    here.write_text(unit.replace("/opt/airlock/", f"{PROJECT}/").replace("deploy/README.md", "README.md"))
    done = subprocess.run([which("systemd-analyze"), "verify", here], capture_output=True, text=True, timeout=60)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "airlock.service" in line]) == (0, [])
    stop = re.search(r"(?m)^TimeoutStopSec=(\d+)$", unit)
    assert stop
    assert int(stop[1]) > settings.ServerSettings().drain_s + 30


def test_what_steps_into_a_group_becomes_the_command():
    script = str(DEPLOY / "delegated.sh")
    assert os.access(script, os.X_OK)
    done = subprocess.run([script, "sh", "-c", 'echo "$0 $$ $1"; exit 7', "a b", "c"], capture_output=True, text=True)
    assert done.returncode == 7
    assert done.stdout.startswith("a b ")
    assert subprocess.run([script], capture_output=True).returncode == 2


def test_the_page_names_every_file_and_no_other():
    page = text("README.md")
    table = page.split("\n## ", 1)[0]
    names = set(re.findall(r"`([\w.]+\.(?:sh|yaml|json|service|example)|Dockerfile)`", table))
    assert names == {file.name for file in DEPLOY.iterdir()} - {"README.md"}
    for option in re.findall(r"`\[server\] (\w+)", page):
        assert option in settings.ServerSettings.model_fields
