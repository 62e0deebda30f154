from tests.security.frame import Attack

ATTACKS: list[Attack] = []
