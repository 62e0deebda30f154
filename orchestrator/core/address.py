"""The address of a server: what may be shown of it, what is secret in it, and which server it is. Pure."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import unquote


def shown(address: str) -> str:
    """Without user information. What is before the last @ goes, for a password may have been written with a / in it."""
    return re.sub(r"(?<=//).*@", "", address, flags=re.DOTALL)


def secret(address: str) -> str | None:
    """The password in it, as it is sent; the name, which is a token then, where there is no password."""
    found = re.search(r"//(.*)@", address, re.DOTALL)
    if not found:
        return None
    name, _, password = found[1].partition(":")
    return unquote(password or name) or None


def digest(address: str) -> str:
    """SHA-256, which tells servers apart: of the address without user information."""
    return hashlib.sha256(shown(address).rstrip("/").encode()).hexdigest()
