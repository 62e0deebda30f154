"""Every attack there is, in the order of the table."""

from __future__ import annotations

from tests.security.attacks import channel, context, files, network, privilege, resources, tenants
from tests.security.frame import Attack

ATTACKS: list[Attack] = [
    attack for group in (network, files, privilege, resources, channel, context, tenants) for attack in group.ATTACKS
]
