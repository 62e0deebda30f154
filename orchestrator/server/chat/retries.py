"""Requests that clients repeat by themselves after they gave them up, which would be asked and paid for again.

OpenAI's clients do that when their time-out is over, and say so in a header. What they gave up was cancelled, for all
that we can know is that nobody waits for it any more; asked again it would most likely come to the same end.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import sha256

from orchestrator.server.chat.errors import NO_RETRY
from orchestrator.server.problems import Problem

KEPT_S = 600.0  # that a client may take to come again
MOST = 10_000  # that are kept
_HEADER = "x-stainless-retry-count"
_given_up: OrderedDict[bytes, float] = OrderedDict()  # digest -> when, the newest last


def given_up(tenant: str, fingerprint: bytes) -> None:
    """The client of such a request has gone before it was answered."""
    digest = _digest(tenant, fingerprint)
    _given_up[digest] = time.monotonic()
    _given_up.move_to_end(digest)
    while len(_given_up) > MOST:
        _given_up.popitem(last=False)


def require_wanted(headers: Mapping[str, str], tenant: str, fingerprint: bytes) -> None:
    """Raises Problem where a client repeats what it has given up."""
    if headers.get(_HEADER, "0") == "0":  # a person who asks again means it
        return
    at = _given_up.get(_digest(tenant, fingerprint))
    if at is not None and time.monotonic() - at < KEPT_S:
        text = (
            "the client gave this request up before it was answered, so its query was cancelled, and is not asked anew "
            "by a retry: set a longer timeout, stream, or send an Idempotency-Key"
        )
        raise Problem(422, "given-up", text, headers=NO_RETRY)


def _digest(tenant: str, fingerprint: bytes) -> bytes:
    return sha256(tenant.encode() + b"\0" + fingerprint).digest()
