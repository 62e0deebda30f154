"""The only reader of the environment and of `airlock.toml`. Secrets are masked in every representation."""

from __future__ import annotations

import os
import re
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

import platformdirs
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from orchestrator.files import Missing, Unreadable, read_text

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"
_PACKAGE = Path(__file__).parent
_SANDBOXES = 96  # at once


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Strict):
    """What the operator says of one model. base_url and api_key_env fall back to the defaults of the file."""

    base_url: str | None = None
    api_key_env: str | None = None
    prompt_bytes: int | None = Field(default=None, gt=1024)
    output_tokens: int | None = Field(default=None, gt=0)
    style: Literal["standard", "small"] | None = None
    extra: dict[str, Any] = {}


class PoolSettings(_Strict):
    """Sandboxes that a long-lived Airlock keeps ready. size: backend or isolation level -> how many, 0 where not named.

    memory_share: of this machine's memory, the most that those which wait may use together.
    """

    size: dict[str, Annotated[int, Field(ge=0, le=1000)]] = {}
    memory_share: float = Field(default=0.25, gt=0, le=1)


class PlatformSettings(_Strict):
    """What all tenants of one Airlock share. month_usd: what they may spend together in a month; None is no limit.

    in_flight: LM calls at once; sandboxes: at once, on each level of child queries. Who waits gets a turn by its share.
    """

    month_usd: Decimal | None = Field(default=None, ge=0, le=10**9)
    in_flight: int = Field(default=256, ge=1, le=100_000)
    sandboxes: int = Field(default=_SANDBOXES, ge=1, le=10_000)


def _host(name: str) -> str:
    """As the header Host has it, less the port."""
    if not re.fullmatch(r"\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9]([A-Za-z0-9._-]{0,253}[A-Za-z0-9])?", name, re.ASCII):
        raise ValueError("is not the name of a host: give it without a scheme, a port or a path")
    return name


class ServerSettings(_Strict):
    """What `airlock serve` takes. hosts: names it answers to, besides this machine's own; empty for any.

    queries: that run at once, of all tenants; where it is not said four for each CPU, 96 at most. queue, queue_tenant:
    that wait, of all and of one. inline_bytes: of a context within a request; upload_bytes: of one context;
    stored_bytes: of all contexts of a tenant; uploads: under way, of a tenant. requests_minute: HTTP requests of a
    tenant. streams: event streams of a tenant at once. drain_s: how long running queries have to end when the service
    stops, before they are left to be resumed.
    """

    hosts: list[Annotated[str, AfterValidator(_host)]] = []
    queries: int = Field(default_factory=lambda: min(4 * len(os.sched_getaffinity(0)), _SANDBOXES), ge=1, le=10_000)
    queue: int = Field(default=1000, ge=1, le=100_000)
    queue_tenant: int = Field(default=100, ge=1, le=100_000)
    inline_bytes: int = Field(default=8 << 20, ge=1024, le=1 << 30)
    upload_bytes: int = Field(default=1 << 30, ge=1024, le=1 << 44)
    stored_bytes: int = Field(default=20 << 30, ge=1024, le=1 << 50)
    uploads: int = Field(default=20, ge=1, le=10_000)
    requests_minute: int = Field(default=3000, ge=1, le=10_000_000)
    streams: int = Field(default=100, ge=1, le=10_000)
    drain_s: float = Field(default=30, ge=0, le=3600)


class AuditSettings(_Strict):
    """anchors: where `airlock audit anchor` puts checkpoints when no place is named; see `store/anchors.py`."""

    anchors: list[str] = []


_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]


class Runtimes(_Strict):
    """What the Docker engine calls the runtime of each backend."""

    docker: _Name = "runc"
    gvisor: _Name = "runsc"
    kata: _Name = "kata"


class Config(_Strict):
    """`airlock.toml`. prices: model -> [input, output] in USD per million tokens. sub_model: several are by depth.

    database: see the function.
    """

    model: str | None = None
    sub_model: str | list[str] | None = None
    base_url: str | None = None
    api_key_env: str = DEFAULT_KEY_VARIABLE
    models: dict[str, ModelSettings] = {}
    prices: dict[str, tuple[Decimal, Decimal]] = {}
    pool: PoolSettings = PoolSettings()
    platform: PlatformSettings = PlatformSettings()
    runtimes: Runtimes = Runtimes()
    audit: AuditSettings = AuditSettings()
    server: ServerSettings = ServerSettings()
    database: SecretStr | None = None


def home() -> Path:
    """The data folder: AIRLOCK_HOME, else the XDG data folder of this user."""
    set_home = os.environ.get("AIRLOCK_HOME")
    return Path(set_home).absolute() if set_home else platformdirs.user_data_path("airlock", appauthor=False)


def load_config(folder: Path) -> Config:
    """`airlock.toml` in the data folder, else defaults. Raises ValueError.

    Never one in the current folder: whoever made the folder would say which server gets which secret.
    """
    path = folder / "airlock.toml"
    try:
        return Config.model_validate(tomllib.loads(read_text(path)))
    except Missing:
        return Config()
    except Unreadable as why:
        raise ValueError(f"cannot read {path}: {why}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise ValueError(f"{path}: {where}: {fault['msg'].removeprefix('Value error, ')}") from None


def api_key(variable: str) -> SecretStr | None:
    """The key in an environment variable, if there is one."""
    key = os.environ.get(variable)
    return SecretStr(key) if key else None


def master_key() -> SecretStr | None:
    """The key that all keys of the database are sealed with, in base64, from AIRLOCK_MASTER_KEY if it is there."""
    return api_key("AIRLOCK_MASTER_KEY")


def database(config: Config) -> str | None:
    """The address of the PostgreSQL database for ledger and journal: AIRLOCK_DATABASE, else what the file says.

    None for SQLite in the data folder. Raises ValueError, in which nothing of the address is shown: it may hold a
    password.
    """
    secret = api_key("AIRLOCK_DATABASE") or config.database
    if secret is None:
        return None
    address = secret.get_secret_value()
    if not re.fullmatch(r"postgresql(\+psycopg)?://([^@/]*@)?[^@]*", address):
        raise ValueError(
            "AIRLOCK_DATABASE, or `database` in airlock.toml, is not postgresql://USER:PASSWORD@HOST/NAME; "
            "in the password write @ as %40, / as %2F, : as %3A and % as %25"
        )
    return address


def database_password(config: Config) -> str | None:
    """As it stands in the address, if it does."""
    address = database(config)
    found = re.match(r"[^:]+://[^@/:]*:([^@/]+)@", address) if address else None
    return unquote(found[1]) if found else None


def collector() -> str | None:
    """Where traces go, by OpenTelemetry's variables: the address for traces, else the collector's; None for nowhere.

    Headers, certificates and time-outs are read by its exporter.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    whole, base = (os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") for name in ("TRACES_ENDPOINT", "ENDPOINT"))
    return whole or (f"{base.rstrip('/')}/v1/traces" if base else None)


def docker_socket() -> str:
    """The engine's socket: that of DOCKER_HOST, else the usual one. Raises ValueError for an engine elsewhere.

    The context is shared with a container by mounting a folder, so the engine has to be on this machine.
    """
    named = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not named.startswith("unix://"):
        raise ValueError(f"DOCKER_HOST={named}: sandboxes need an engine on this machine, unix:///path/of/its.sock")
    return named.removeprefix("unix://")


def data_folder(name: str) -> Path:
    """`policies` or `sandbox_images` as shipped: inside the package when installed, beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
