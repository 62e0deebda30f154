"""What a tenant may be called: its name is a part of the names of logs, keys and files."""

from __future__ import annotations

import re

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_NAME = re.compile(NAME)


def is_tenant(name: str) -> bool:
    return _NAME.fullmatch(name) is not None
