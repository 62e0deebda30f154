"""What README shows is run as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from orchestrator.settings import Config, ModelSettings, PoolSettings, ServerSettings, load_config

PROJECT = Path(__file__).parents[2]


def blocks(language: str) -> list[str]:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


BLOCKS = blocks("python")


def test_there_is_something_to_run():
    assert BLOCKS


def test_the_configuration_is_read_and_has_every_key(tmp_path: Path):
    text = "\n".join(blocks("toml"))
    (tmp_path / "airlock.toml").write_text(text)
    config = load_config(tmp_path)
    assert config.model_fields_set == set(Config.model_fields)
    (own,) = config.models.values()
    assert own.model_fields_set == set(ModelSettings.model_fields)
    assert config.pool.model_fields_set == set(PoolSettings.model_fields)
    assert config.server == ServerSettings()
    assert config.server.model_fields_set == set(ServerSettings.model_fields)
    assert config.prices == {"large": (Decimal("0.5"), Decimal("1.5")), "small": (0, 0)}


@pytest.mark.parametrize("code", BLOCKS)
def test_a_block_of_python(code: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=PROJECT,
        env={**os.environ, "AIRLOCK_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("6433012 0.00 ")
