"""What a container is asked for, and how the engine's frames are taken apart: pure, without an engine."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.errors import NotPermitted, RequestError, SandboxUnusable
from orchestrator.sandbox.agent import agent_version
from orchestrator.sandbox.attached import Demultiplexer
from orchestrator.sandbox.base import Isolation, Slot
from orchestrator.sandbox.container import request
from orchestrator.sandbox.images import Images
from orchestrator.sandbox.registry import make_backend
from orchestrator.sandbox.runtimes import RUNC, RUNSC
from tests.sandboxes import MIB, SECCOMP, spec_for
from tests.unit.helpers import quick

SLOT = Slot(7, Path("/data/slots/slot-7"), 2_000_000_007)
IMAGE = "sha256:" + "0" * 64
SOURCES = Path(__file__).parents[2] / "sandbox_images"


def asked(runtime: Any = RUNC, *, apparmor: bool = False, **changes: Any) -> dict[str, Any]:
    return request(spec_for(SLOT, **changes), runtime, IMAGE, SECCOMP.read_text(), apparmor=apparmor)


def host(**options: Any) -> dict[str, Any]:
    return asked(**options)["HostConfig"]


def test_a_container_has_no_privileges():
    config = host()
    assert config["CapDrop"] == ["ALL"]
    assert "CapAdd" not in config
    assert not config["Privileged"]
    assert config["ReadonlyRootfs"]
    assert "no-new-privileges" in config["SecurityOpt"]
    assert asked()["User"] == "2000000007:2000000007"


def test_the_profile_goes_inline_and_is_the_one_that_bubblewrap_has():
    (profile,) = (option for option in host()["SecurityOpt"] if option.startswith("seccomp="))
    assert json.loads(profile.removeprefix("seccomp=")) == json.loads(SECCOMP.read_text())


def test_apparmor_is_asked_for_where_the_host_has_it():
    assert "apparmor=docker-default" in host(apparmor=True)["SecurityOpt"]
    assert not any("apparmor" in option for option in host()["SecurityOpt"])


def test_a_container_shares_nothing_and_reaches_nothing():
    config = host()
    assert asked()["NetworkDisabled"]
    assert config["NetworkMode"] == "none"
    assert config["IpcMode"] == "none"
    assert (config["PidMode"], config["UTSMode"], config["CgroupnsMode"]) == ("", "", "private")
    (mount,) = config["Mounts"]
    assert (mount["Source"], mount["Target"], mount["ReadOnly"]) == ("/data/slots/slot-7", "/context", True)
    assert mount["BindOptions"] == {"Propagation": "rprivate"}
    assert not {"Binds", "Devices", "VolumesFrom", "Links", "DeviceRequests"} & config.keys()
    assert asked()["Env"] == ["PATH=/usr/bin", "HOME=/tmp", "LANG=C.UTF-8"]


def test_limits_are_those_of_the_spec():
    config = host(memory_bytes=100 * MIB, cpus=0.5, pids=10, tmp_bytes=5 * MIB, files=99)
    assert config["Memory"] == config["MemorySwap"] == 132 * MIB
    assert config["NanoCpus"] == 500_000_000
    assert config["CpuShares"] == 256
    assert config["PidsLimit"] == 18
    assert config["Tmpfs"] == {"/tmp": f"rw,noexec,nosuid,nodev,mode=1777,size={5 * MIB},nr_inodes=16384"}
    limits = {limit["Name"]: limit["Hard"] for limit in config["Ulimits"]}
    assert limits == {"nofile": 99, "fsize": 5 * MIB, "core": 0, "memlock": 0, "msgqueue": 0}


def test_gvisor_gets_room_for_its_own_threads():
    config = host(runtime=RUNSC, pids=10)
    assert (config["Runtime"], config["PidsLimit"]) == ("runsc", 522)


def test_what_is_the_hosts_in_proc_and_sys_is_out_of_sight():
    assert {"/sys", "/proc/sys", "/proc/cmdline", "/proc/stat", "/proc/kcore"} <= set(host()["MaskedPaths"])
    covered = host(runtime=RUNSC)["Tmpfs"]  # it masks no path, and starts without either
    assert covered["/proc"] == covered["/sys"] == "ro,noexec,nosuid,nodev,mode=555,size=4k"


def test_a_container_ends_with_its_orchestrator_and_leaves_no_log():
    config, whole = host(), asked()
    assert whole["OpenStdin"]
    assert whole["StdinOnce"]
    assert not whole["Tty"]
    assert config["LogConfig"] == {"Type": "none"}
    assert config["RestartPolicy"] == {"Name": "no"}
    assert not config["Init"]
    assert "Cmd" not in whole
    assert whole["Image"] == IMAGE


def test_without_a_user_id_of_its_own_a_slot_still_has_one_inside():
    spec = spec_for(Slot(3, Path("/data/slots/slot-3"), None))
    assert request(spec, RUNC, IMAGE, "{}", apparmor=False)["User"] == "2000000003:2000000003"


def frame(stream: int, data: bytes) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(data).to_bytes(4, "big") + data


@quick
@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=50))), st.integers(1, 20))
def test_frames_are_taken_apart_however_they_arrive(frames: list[tuple[int, bytes]], size: int):
    raw = b"".join(frame(*one) for one in frames)
    taken, out = Demultiplexer(), b""
    for at in range(0, len(raw), size):
        out += taken.feed(raw[at : at + size])
    assert out == b"".join(data for stream, data in frames if stream == 1)
    assert taken.words == b"".join(data for stream, data in frames if stream == 2)[-4096:]


def images(folder: Path, content: str | None) -> Images:
    if content is not None:
        (folder / "images.json").write_text(content)
    return Images(folder / "images.json", SOURCES)


def test_the_image_on_record_is_the_one_that_runs(tmp_path: Path):
    record = {"python": {"id": IMAGE, "agent": agent_version()}, "data": {"id": "other", "agent": agent_version()}}
    assert images(tmp_path, json.dumps(record)).expected("python") == IMAGE
    assert images(tmp_path, json.dumps(record)).expected("data") == "other"


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (None, "is not built"),
        ("{}", "is not built"),
        (json.dumps({"python": {"id": IMAGE}}), "is not built"),
        ("", "cannot read"),
        ("[]", "cannot read"),
        ('{"python": []}', "cannot read"),
        (json.dumps({"python": {"id": IMAGE, "agent": "another"}}), "is of another version"),
    ],
)
def test_without_the_right_image_nothing_runs(tmp_path: Path, record: str | None, says: str):
    with pytest.raises(SandboxUnusable, match=f"{says}.*: run `airlock images build`"):
        images(tmp_path, record).expected("python")


def test_one_image_does_not_stand_for_another(tmp_path: Path):
    record = json.dumps({"python": {"id": IMAGE, "agent": agent_version()}})
    with pytest.raises(SandboxUnusable, match="the image 'data' is not built: run `airlock images build data`"):
        images(tmp_path, record).expected("data")
    with pytest.raises(RequestError, match="there is no image 'gpu'; there are python and data"):
        images(tmp_path, record).build(None, "gpu", offline=True, say=print)


def test_builds_at_the_same_time_do_not_lose_each_others_record(tmp_path: Path):
    there = images(tmp_path, None)
    entries = {f"image{n}": {"id": str(n), "agent": agent_version()} for n in range(40)}
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(there._put, entries, entries.values()))
    assert [there.expected(name) for name in entries] == [str(n) for n in range(40)]


def test_the_lock_names_whole_packages():
    python, data = (images(SOURCES, None).packages(name) for name in ("python", "data"))
    assert {"libc6", "python3.11-minimal", "libpython3.11-stdlib"} <= {package.name for package in python}
    assert data[: len(python)] == python
    assert {"python3-numpy", "python3-pandas", "tzdata"} <= {package.name for package in data[len(python) :]}
    assert all(re.fullmatch("[0-9a-f]{64}", package.sha256) for package in data)
    assert len({package.name for package in data}) == len(data)


def test_an_image_that_a_backend_has_not_is_refused(tmp_path: Path):
    with pytest.raises(NotPermitted, match="asks for image 'data', and backend bubblewrap has this machine's Python"):
        make_backend("bubblewrap", least="namespace", home=tmp_path, image="data")
    with pytest.raises(SandboxUnusable, match=r"the image 'data' is not built.*; bubblewrap: the policy asks"):
        make_backend("auto", least="namespace", home=tmp_path, image="data")


def test_weaker_isolation_is_never_picked(tmp_path: Path):
    assert make_backend("auto", least="namespace", home=tmp_path).isolation == Isolation.namespace
    with pytest.raises(NotPermitted, match="gives 'container'"):
        make_backend("docker", least="gvisor", home=tmp_path)
    with pytest.raises(
        SandboxUnusable,
        match=r"at least 'gvisor', which the policy asks for: kata: the sandbox's image .*; gvisor: the",
    ):
        make_backend("auto", least="gvisor", home=tmp_path)
    with pytest.raises(RequestError, match="there are bubblewrap, docker, gvisor, kata and auto"):
        make_backend("podman", least="namespace", home=tmp_path)


def test_an_engine_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.1:2375")
    with pytest.raises(SandboxUnusable, match="need an engine on this machine"):
        make_backend("docker", least="namespace", home=tmp_path)
