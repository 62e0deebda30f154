"""What a tenant may be called."""

from __future__ import annotations

import pytest

from orchestrator.core.errors import StoreError
from orchestrator.core.tenants import is_tenant
from orchestrator.store.journal import own_chain
from orchestrator.store.logs import tenants_log

NAMES = ["a", "0", "default", "tenant-7", "A.b_c-d", "x" * 64]
NO_NAMES = ["", "x" * 65, "a/b", "../x", ".", "-a", "_a", "a\n", "\na", "a b", "a\0", "é", "a\u200b", "x" * 100_000]


@pytest.mark.parametrize("name", NAMES)
def test_a_name(name: str):
    assert is_tenant(name)
    assert tenants_log(name) == f"tenants/{name}"


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_has_no_log(name: str):
    assert not is_tenant(name)
    for log_of in (tenants_log, own_chain):
        with pytest.raises(StoreError, match="is no name of a tenant") as caught:
            log_of(name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
