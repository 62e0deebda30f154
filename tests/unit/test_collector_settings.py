"""Where traces go, by the variables of OpenTelemetry."""

from __future__ import annotations

import sys
from typing import Any, cast

import pytest

from orchestrator import serving
from orchestrator.core.errors import RequestError
from orchestrator.server.metrics import Metrics
from orchestrator.settings import collector


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SDK_DISABLED", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/"}, "http://c:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c/otlp"}, "http://c/otlp/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/x"}, "http://t/x"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "True"}, None),
    ],
)
def test_the_address(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], address: str | None):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert collector() == address


def test_traces_that_are_asked_for_and_cannot_be_sent(monkeypatch: pytest.MonkeyPatch):
    """Without the extra, the service does not start, rather than start without them."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "orchestrator.server.traces", None)
    books = cast("Any", None)  # nothing is read
    with pytest.raises(RequestError, match="extra `otel`"), serving._traces(books, Metrics()):
        pass


def test_traces_that_nobody_asked_for():
    with serving._traces(cast("Any", None), Metrics()) as traces:
        assert traces is None
