"""`airlock.toml` and the environment: read in one place, faults named, secrets masked."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from orchestrator import settings
from orchestrator.choices import Choices


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The current folder holds no airlock.toml."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def config(home: Path, text: str) -> settings.Config:
    (home / "airlock.toml").write_text(text)
    return settings.load_config(home)


def fault(home: Path, text: str) -> str:
    with pytest.raises(ValueError, match=r"airlock\.toml") as caught:
        config(home, text)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{home / 'airlock.toml'}: ")


def test_without_a_file_there_are_defaults(home: Path):
    assert settings.load_config(home) == settings.Config()
    assert settings.Config().api_key_env == "OPENAI_API_KEY"


@pytest.mark.parametrize(("cpus", "queries"), [(1, 4), (2, 8), (64, 96)])
def test_queries_at_once_are_of_the_machine_and_never_more_than_it_has_sandboxes(
    cpus: int, queries: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(cpus)))
    assert settings.ServerSettings().queries == queries <= settings.PlatformSettings().sandboxes


@pytest.mark.parametrize("name", ["exa mple", "http://x", "x:8080", "x/", "", "a" * 256, "[::1", "\u00fc"])
def test_what_is_no_name_of_a_host(home: Path, name: str):
    assert fault(home, f'[server]\nhosts = ["airlock.example", "{name}"]') == (
        "server.hosts.1: is not the name of a host: give it without a scheme, a port or a path"
    )
    assert config(home, '[server]\nhosts = ["[::1]", "a-b.example", "10.0.0.1"]').server.hosts


def test_a_whole_file(home: Path):
    found = config(
        home,
        """
        model = "mine"
        sub_model = "other"
        base_url = "http://127.0.0.1:8000/v1"
        api_key_env = "MINE"
        [models.mine]
        prompt_bytes = 20000
        style = "small"
        extra = {temperature = 0.5}
        [prices]
        mine = [0.1, 2]
        """,
    )
    assert (found.model, found.sub_model, found.api_key_env) == ("mine", "other", "MINE")
    assert (found.models["mine"].prompt_bytes, found.models["mine"].extra) == (20_000, {"temperature": 0.5})
    assert found.prices == {"mine": (Decimal("0.1"), Decimal(2))}


def test_a_file_in_the_current_folder_is_not_read(home: Path):
    """Whoever made the folder, with the context in it, would say which server gets which secret."""
    Path("airlock.toml").write_text('model = "here"')
    assert settings.load_config(home).model is None
    assert config(home, 'model = "there"').model == "there"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model =", "not TOML"),
        ("modle = 'x'", "modle: Extra inputs are not permitted"),
        ("model = 3", "model: Input should be a valid string"),
        ("[models.m]\nprompt_bytes = 5", "models.m.prompt_bytes: Input should be greater than 1024"),
        ("[models.m]\nstyle = 'tiny'", "models.m.style: Input should be 'standard' or 'small'"),
        ("[models.m]\napi_key = 'sk-secret'", "models.m.api_key: Extra inputs are not permitted"),
        ("[prices]\nm = 3", "prices.m: Input should be a valid tuple"),
        ("[prices]\nm = [1]", "prices.m.1: Field required"),
        ("[prices]\nm = ['x', 1]", "prices.m.0: Input should be a valid decimal"),
        ("[prices]\nm = [nan, 1]", "prices.m.0: Input should be a finite number"),
        ("prices = 3", "prices: Input should be a valid dictionary"),
    ],
)
def test_a_fault_names_its_key(home: Path, text: str, said: str):
    found = fault(home, text)
    assert found.startswith(said)
    assert "sk-secret" not in found


def test_a_file_that_cannot_be_read(home: Path):
    (home / "airlock.toml").mkdir()
    with pytest.raises(ValueError, match="cannot read"):
        settings.load_config(home)
    (home / "airlock.toml").rmdir()
    (home / "airlock.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="cannot read"):
        settings.load_config(home)


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("AIRLOCK_HOME", "relative")
    assert settings.home() == tmp_path / "relative"
    monkeypatch.delenv("AIRLOCK_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert settings.home() == tmp_path / "xdg" / "airlock"


def test_a_key_is_masked_wherever_it_is_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINE", "sk-secret")
    key = settings.api_key("MINE")
    assert key is not None
    assert key.get_secret_value() == "sk-secret"
    assert "sk-secret" not in f"{key} {key!r}"
    monkeypatch.setenv("MINE", "")
    assert settings.api_key("MINE") is None


def test_a_key_that_was_handed_in_is_not_shown():
    assert "sk-secret" not in repr(Choices(api_key="sk-secret"))


def test_the_policies_are_there():
    assert (settings.data_folder("policies") / "default.yaml").is_file()


ADDRESS = "postgresql://u:secret@h/airlock"


def test_the_database_is_where_the_environment_says_else_the_file(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AIRLOCK_DATABASE", raising=False)
    assert settings.database(config(home, "")) is None
    assert settings.database(config(home, f"database = '{ADDRESS}'")) == ADDRESS
    monkeypatch.setenv("AIRLOCK_DATABASE", "postgresql+psycopg://postgres@/airlock?host=/run/postgresql")
    assert settings.database(config(home, f"database = '{ADDRESS}'")).endswith("?host=/run/postgresql")


def test_the_database_is_masked_wherever_it_is_shown(home: Path):
    found = config(home, f"database = '{ADDRESS}'")
    assert "secret" not in f"{found} {found!r} {found.model_dump()} {found.model_dump_json()}"
    assert "secret" not in fault(home, f"database = ['{ADDRESS}']")


@pytest.mark.parametrize(
    "address", ["mysql://u:secret@h/x", "secret", "postgresql://u:p@secret@h/x", "postgresql://u:p/secret@h/x"]
)
def test_an_address_that_is_none_is_refused_without_showing_it(
    home: Path, address: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("AIRLOCK_DATABASE", raising=False)
    with pytest.raises(
        ValueError, match="is not postgresql://USER:PASSWORD@HOST/NAME; in the password write"
    ) as caught:
        settings.database(config(home, f"database = '{address}'"))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
