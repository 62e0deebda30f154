"""The OpenAPI document, held against the service by Schemathesis: what it permits is asked, and what it does not.

No fault of the service, no status, header, type or shape that the document does not have, and nothing that it forbids
is taken. Which query a cursor is of, or whether a policy's text is one, a schema cannot say: so a request that fits the
document may still be refused, and `positive_data_acceptance` is left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import PROJECT, Airlock
from tests.schemathesis_hooks import TENANT
from tests.service import SCRIPT, Served, ask, served

ALL = ("query", "read", "audit", "metrics", "admin")
TUS = {"Tus-Resumable": "1.0.0", "Upload-Length": "10"}
SERVICE = "[server]\nrequests_minute = 1000000\nqueue = 10000\nqueue_tenant = 10000\nuploads = 10000\n"
CONFIG = """
hooks = "tests.schemathesis_hooks"
suppress-health-check = ["filter_too_much"]  # a model's name has few rules that a generator can use
continue-on-failure = true
max-stream-events = 20
warnings = false

[generation]
deterministic = true
max-examples = {examples}
allow-extra-parameters = false  # HTTP has whoever asks send further headers
no-shrink = true

[checks.negative_data_rejection]
expected-statuses = [400, 401, 402, 403, 404, 405, 408, 409, 412, 413, 415, 422, 429, 503]

[phases.stateful]
max-steps = 6
generation.max-examples = 40

[parameters]
{parameters}
"""


@pytest.mark.timeout(400)
def test_the_service_is_as_its_document_says(airlock: Airlock):
    with served(airlock, script=SCRIPT.replace("context[:20]", "str(context)[:20]"), config=SERVICE) as server:
        held(server, "--phases", "coverage,fuzzing,stateful", examples=5)


def test_what_is_there_is_as_the_document_says(airlock: Airlock):
    """Ids of what there is, which a generator does not find."""
    with served(airlock, script=SCRIPT.replace("context[:20]", "str(context)[:20]"), config=SERVICE) as server:
        with server.client(TENANT, *ALL) as client:
            query = ask(client)["id"]
            context = client.put("/v1/contexts", content=b"The bell rang at nine.").json()["id"]
            upload = client.post("/v1/contexts", headers=TUS).json()["id"]
            model = client.get("/v1/models").json()["data"][0]["id"]
        names = {"query": query, "context": context, "upload": upload, "model": model, "tenant": TENANT}
        read = (
            "--phases",
            "coverage",
            "--mode",
            "positive",
            "--include-path-regex",
            r"\{",
        )
        held(server, *read, examples=1, **names)


def held(server: Served, *options: str, examples: int, **parameters: str) -> None:
    """Raises AssertionError with all that Schemathesis has to say."""
    given = "\n".join(f'"path.{name}" = "{value}"' for name, value in parameters.items())
    config = server.airlock.file("schemathesis.toml", CONFIG.format(examples=examples, parameters=given))
    program = str(Path(sys.executable).with_name("st"))
    key = server.key(TENANT, *ALL)
    command = [program, "--config-file", str(config), "run", f"{server.url}/openapi.json", "--no-color"]
    command += ["-H", f"Authorization: Bearer {key}", "--exclude-checks", "positive_data_acceptance", *options]
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        command, cwd=server.airlock.folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    with server.client(TENANT, *ALL) as client:
        assert client.get("/v1/session").status_code == 200, (
            "it has locked itself out, and what came then shows nothing"
        )
