"""Which runtimes are refused, and which the engine is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.errors import NotPermitted, SandboxUnusable
from orchestrator.sandbox.agent import agent_version
from orchestrator.sandbox.base import Finding, Isolation
from orchestrator.sandbox.container import request
from orchestrator.sandbox.registry import make_backend
from orchestrator.sandbox.runtimes import KATA, RUNTIMES, is_backport, known_faults, why_refused
from tests.fakes.engine import fake_engine
from tests.sandboxes import SECCOMP, spec_for
from tests.unit.test_docker import IMAGE, SLOT


@pytest.mark.parametrize(
    "revision",
    [
        *("v1.1.12-0-g51d5e94", "1.1.12", "1.1.15+ds1-2", "1.1.5+ds1-1+deb12u1", "1.1.5+ds1-1+deb12u2"),
        *("v1.4.0-rc.1", "1.0.0~rc93+ds1-5+deb11u3", "1.1.7-0ubuntu1~22.04.2", "2.0.0"),
    ],
)
def test_a_runc_that_is_taken(revision: str):
    assert why_refused(revision) is None


@pytest.mark.parametrize(
    "revision",
    [
        *("v1.1.11-0-g4bccb38c", "1.1.5", "1.1.5+ds1-1", "1.1.5+ds1-1+deb12u0", "1.1.5+ds1-1+deb12u1.local"),
        *("1.0.0~rc93", "1.0.0~rc93+ds1-5+deb11u2", "1.1.7-0ubuntu1~22.04.1", "0.9.9"),
    ],
)
def test_a_runc_that_lets_guests_out_is_refused(revision: str):
    remedy = "install 1.1.12 or newer, or your distribution's update of it"
    assert why_refused(revision) == f"runc {revision} lets guests out (CVE-2024-21626): {remedy}"


@pytest.mark.parametrize("revision", ["", "unknown", "4bccb38"])
def test_a_runc_of_an_unknown_version_is_refused(revision: str):
    assert "does not say which runc it has" in (why_refused(revision) or "")


def test_a_backport_is_told_from_what_is_new_enough():
    assert is_backport("1.1.5+ds1-1+deb12u1")
    assert not is_backport("v1.1.12-0-g51d5e94")


@pytest.mark.parametrize(
    ("revision", "named"),
    [
        *(("1.1.5+ds1-1+deb12u1", True), ("v1.2.7", True), ("1.2.8", False), ("v1.3.2", True)),
        *(("v1.3.3-0-g1", False), ("1.4.0", False), ("2.0.0", False)),
    ],
)
def test_what_is_known_of_a_runc_is_named(revision: str, named: bool):
    assert ("CVE-2025-31133, CVE-2025-52565 and CVE-2025-52881" in known_faults(revision)) == named


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A data folder with an image on record."""
    (tmp_path / "images.json").write_text(json.dumps({"python": {"id": IMAGE, "agent": agent_version()}}))
    return tmp_path


@pytest.fixture
def engine(built: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts one, and points Airlock to it."""

    def start(**options: Any) -> Any:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{built}/docker.sock")
        return fake_engine(built / "docker.sock", **options)

    return start


async def findings(name: str, home: Path) -> dict[str, Finding]:
    backend = make_backend(name, least="namespace", home=home)
    found = {finding.name: finding for finding in await backend.diagnose()}
    backend.close()
    return found


@pytest.mark.anyio
async def test_the_docker_backend_refuses_it_and_gvisor_does_not_use_it(built: Path, engine: Any):
    with engine(runc="1.1.11", runtimes=("runc", "runsc")):
        backend = make_backend("docker", least="namespace", home=built)
        with pytest.raises(SandboxUnusable, match=r"^runc 1\.1\.11 lets guests out"):
            backend.require_usable()
        refused = (await findings("docker", built))["engine"]
        assert (refused.ok, refused.needed) == (False, True)
        assert "CVE-2024-21626" in refused.text
        assert all(finding.ok for finding in (await findings("gvisor", built)).values() if finding.needed)


@pytest.mark.anyio
async def test_what_doctor_is_told_of_an_engine(built: Path, engine: Any):
    with engine(runc="v1.3.0-0-g1"):
        found = await findings("docker", built)
    assert found["engine"].text == "Docker 29.0.0, containerd of an unknown version"
    assert found["runc"].text == "v1.3.0-0-g1"
    assert not found["known-bad"].ok
    assert not found["known-bad"].needed
    assert (found["AppArmor"].ok, found["AppArmor"].text) == (True, "profile docker-default")


def test_kata_is_taken_where_the_engine_has_it(built: Path, engine: Any):
    with engine(runtimes=("runc", "kata")):
        strongest = make_backend("auto", least="namespace", home=built)
        assert (strongest.name, strongest.isolation) == ("kata", Isolation.microvm)
        strongest.close()
        chosen = make_backend("kata", least="microvm", home=built)
        chosen.require_usable()
        chosen.close()
    asked = request(spec_for(SLOT, pids=10), KATA, IMAGE, SECCOMP.read_text(), apparmor=False)
    assert (asked["HostConfig"]["Runtime"], asked["HostConfig"]["PidsLimit"]) == ("kata", 18)


def test_kata_is_refused_where_the_engine_has_it_not(built: Path, engine: Any):
    with engine():
        backend = make_backend("kata", least="namespace", home=built)
        with pytest.raises(SandboxUnusable, match="Docker has no runtime 'kata': see /etc/docker/"):
            backend.require_usable()
        backend.close()
        with pytest.raises(SandboxUnusable, match="at least 'microvm', which the policy asks for: kata: Docker has no"):
            make_backend("auto", least="microvm", home=built)
        assert make_backend("auto", least="namespace", home=built).name == "docker"


def test_a_runtime_may_have_another_name_in_the_engine(built: Path, engine: Any):
    (built / "airlock.toml").write_text('[runtimes]\ngvisor = "runsc-kvm"\n')
    with engine(runtimes=("runc", "runsc-kvm")):
        backend = make_backend("gvisor", least="gvisor", home=built)
        backend.require_usable()
        backend.close()
    (built / "airlock.toml").write_text('[runtimes]\npodman = "crun"\n')
    with pytest.raises(SandboxUnusable, match=r"runtimes\.podman: Extra inputs"):
        make_backend("gvisor", least="gvisor", home=built)
    with pytest.raises(NotPermitted):
        make_backend("docker", least="gvisor", home=built)


def test_each_runtime_makes_one_backend():
    assert [runtime.backend for runtime in RUNTIMES] == ["docker", "gvisor", "kata"]
