"""The system call filter, as data and compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.sandbox.seccomp import compile_profile, compiled_profile
from tests.sandboxes import SECCOMP

PROFILE: dict[str, Any] = json.loads(SECCOMP.read_text())
DANGEROUS = [
    "acct",
    "add_key",
    "bpf",
    "chroot",
    "clock_settime",
    "clone3",
    "create_module",
    "delete_module",
    "execveat",
    "fanotify_init",
    "finit_module",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "get_kernel_syms",
    "init_module",
    "io_setup",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kcmp",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "landlock_create_ruleset",
    "lookup_dcookie",
    "mbind",
    "memfd_create",
    "memfd_secret",
    "migrate_pages",
    "modify_ldt",
    "mount",
    "mount_setattr",
    "move_mount",
    "move_pages",
    "mq_open",
    "msgget",
    "name_to_handle_at",
    "nfsservctl",
    "open_by_handle_at",
    "open_tree",
    "perf_event_open",
    "personality",
    "pidfd_getfd",
    "pidfd_open",
    "pidfd_send_signal",
    "pivot_root",
    "process_madvise",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "query_module",
    "quotactl",
    "reboot",
    "remap_file_pages",
    "request_key",
    "seccomp",
    "semget",
    "set_mempolicy",
    "setdomainname",
    "sethostname",
    "setns",
    "settimeofday",
    "setuid",
    "shmget",
    "swapon",
    "swapoff",
    "sysfs",
    "syslog",
    "umount2",
    "unshare",
    "uselib",
    "userfaultfd",
    "ustat",
    "vhangup",
    "vm86",
    "vmsplice",
    "mknod",
    "mknodat",
    "capset",
    "setgroups",
    "setresuid",
]


def allowed(name: str) -> list[dict[str, Any]]:
    return [r for r in PROFILE["syscalls"] if name in r["names"] and r["action"] == "SCMP_ACT_ALLOW"]


def test_what_is_not_named_is_refused():
    assert PROFILE["defaultAction"] == "SCMP_ACT_ERRNO"
    assert {rule["action"] for rule in PROFILE["syscalls"]} == {"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"}


@pytest.mark.parametrize("name", DANGEROUS)
def test_dangerous_calls_are_refused(name: str):
    assert allowed(name) == []


@pytest.mark.parametrize(
    ("name", "index", "operator"),
    [
        ("socket", 0, "SCMP_CMP_EQ"),
        ("socketpair", 0, "SCMP_CMP_EQ"),
        ("clone", 0, "SCMP_CMP_MASKED_EQ"),
        ("ioctl", 1, "SCMP_CMP_EQ"),
        ("prctl", 0, "SCMP_CMP_EQ"),
    ],
)
def test_some_are_allowed_for_some_arguments_only(name: str, index: int, operator: str):
    rules = allowed(name)
    assert rules
    for rule in rules:
        assert [(arg["index"], arg["op"]) for arg in rule["args"]] == [(index, operator)]


def test_sockets_are_unix_sockets_and_clone_makes_no_namespace():
    assert [rule["args"][0]["value"] for rule in allowed("socket")] == [1]
    (clone,) = allowed("clone")
    namespaces = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
    assert clone["args"][0]["value"] & namespaces == namespaces
    assert clone["args"][0]["valueTwo"] == 0


def test_no_terminal_can_be_typed_into():
    tiocsti, tioclinux = 0x5412, 0x541C
    assert not {tiocsti, tioclinux} & {rule["args"][0]["value"] for rule in allowed("ioctl")}


def test_the_profile_compiles_to_a_program(tmp_path: Path):
    program = compile_profile(PROFILE)
    assert len(program) % 8 == 0  # struct sock_filter
    assert 100 < len(program) // 8 < 4096  # BPF_MAXINSNS
    path = compiled_profile(SECCOMP, tmp_path)
    assert path.read_bytes() == program
    assert compiled_profile(SECCOMP, tmp_path) == path
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_another_profile_is_another_program(tmp_path: Path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(PROFILE | {"syscalls": PROFILE["syscalls"][:1]}))
    assert compiled_profile(other, tmp_path) != compiled_profile(SECCOMP, tmp_path)


def test_an_unknown_action_is_an_error():
    with pytest.raises(ValueError, match="unknown action SCMP_ACT_LOG"):
        compile_profile({"defaultAction": "SCMP_ACT_LOG", "syscalls": []})
