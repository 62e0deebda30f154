"""What `airlock serve` does, from the options of the command line to its end."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import resource
import signal
import socket
from collections.abc import Generator, Mapping
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import anyio
import uvicorn
from anyio.abc import TaskGroup

from orchestrator import settings
from orchestrator.auditing import Books
from orchestrator.choices import Choices
from orchestrator.core.errors import RequestError, StoreError
from orchestrator.core.events import Event, Recorded
from orchestrator.server import logs
from orchestrator.server.app import make_app
from orchestrator.server.bodies import Bodies
from orchestrator.server.desk import Desk
from orchestrator.server.feed import Feed
from orchestrator.server.housekeeping import keep_swept
from orchestrator.server.logs import Accounted
from orchestrator.server.metrics import Metrics
from orchestrator.server.protocol import PER_ADDRESS, limited
from orchestrator.server.service import Service
from orchestrator.server.under_way import UnderWay
from orchestrator.store import journal
from orchestrator.store.registry import Registry
from orchestrator.wiring import open_platform

if TYPE_CHECKING:
    from orchestrator.server.traces import Traces

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
BEHIND_A_PROXY = 16_384  # connections of one address, which the proxy is
MOST_DESCRIPTORS = 1 << 20  # where the machine has no limit
GRACE_S = 5  # for answers under way and streams, once nothing runs any more
HEADER_BYTES = 32 << 10  # of a request's line and headers

_log = logging.getLogger("airlock.serve")


async def serve(options: dict[str, Any], choices: Choices) -> int:
    """Until a signal comes; the exit code. options: host, port, tls_cert, tls_key, insecure_http, log.

    Raises AirlockError.
    """
    host, secure = options["host"], _require_safe(options)
    home = settings.home()
    logs.configure(json=options["log"] == "json")
    _raise_descriptors()
    with _listening(host, options["port"]) as bound:
        async with open_platform(choices, home) as platform:
            platform.require_models()  # who can mend it is here now, and not when a tenant asks
            config = platform.config.server
            registry = Registry(platform.db, platform.vault, platform.notary)
            metrics = Metrics()
            books = Books(home, platform.db, platform.vault)
            under_way: UnderWay
            feed = Feed(books, config.streams, lambda query: under_way.is_here(query))

            def observe(query: str, event: Event) -> None:
                metrics.event(event, query)
                logs.query(event, query)
                feed.wake(query)

            def ended(query: str, tenant: str) -> None:
                metrics.ended(query)
                feed.wake(query)
                if traces:
                    traces.query(query)

            under_way = UnderWay(platform, registry, config.queries, config.drain_s, observe, ended)
            desk = Desk(platform, config, under_way)
            metrics.watch(
                running=lambda: under_way.running,
                waiting=lambda: desk.waiting,
                pool=lambda: sum(shelf.ready for shelf in platform.pool.figures()),
            )
            service = Service(home, config, platform, books, registry, desk, under_way, feed, metrics, secure)
            hosts = _hosts(host, config.hosts)
            app = Bodies(make_app(service), config, hosts=hosts, secure=bool(options["tls_cert"]))
            with _traces(books, metrics) as traces:
                async with under_way:
                    await _run(Accounted(app, metrics, traces), bound, options, service)
    return 0


@contextlib.contextmanager
def _traces(books: Books, metrics: Metrics) -> Generator[Traces | None]:
    """Raises RequestError where they are asked for, and cannot be sent."""
    endpoint = settings.collector()
    if endpoint is None:
        yield None
        return
    try:
        from orchestrator.server.traces import Traces  # needs an extra
    except ImportError as error:
        text = f"traces cannot be sent to where OTEL_EXPORTER_OTLP_ENDPOINT says: {error}"
        raise RequestError(f"{text}; install Airlock again with the extra `otel`") from None

    def history(query: str) -> list[Recorded]:
        return books.db.look(partial(journal.history, query=query, keeper=None))  # without any payload

    traces = Traces(endpoint, history, metrics.traces)
    try:
        yield traces
    finally:
        traces.close()


def _require_safe(options: dict[str, Any]) -> bool:
    """Whether browsers take it for secure. Raises RequestError where keys would go over a network in the clear."""
    cert, key = options["tls_cert"], options["tls_key"]
    if bool(cert) != bool(key):
        raise RequestError("--tls-cert and --tls-key go together")
    if cert or _is_loopback(options["host"]):
        return True
    if not options["insecure_http"]:
        what = f"--host {options['host']} is reached from other machines, and without TLS others could read keys"
        raise RequestError(f"{what}: give --tls-cert and --tls-key, or --insecure-http where a proxy does TLS")
    return False


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hosts(host: str, named: list[str]) -> list[str]:
    """What a request may call us; empty for anything. On loopback never anything: pages of others may resolve to it."""
    if named or _is_loopback(host):
        return [*named, *LOOPBACK, *([] if ":" in host else [host])]
    return []


@contextlib.contextmanager
def _listening(host: str, port: int) -> Generator[socket.socket]:
    """Before anything else is opened: a port that is taken is told at once. Raises RequestError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
    except OSError as error:
        raise RequestError(f"--host {host}: {error.strerror}") from None
    with bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else "no such port"
            raise RequestError(f"cannot listen on {host} port {port}: {why}") from None
        yield bound


class _Server(uvicorn.Server):
    """Signals are ours: running queries have to be seen to first. about: what the log is told when it serves."""

    def __init__(self, config: uvicorn.Config, about: Mapping[str, str]) -> None:
        super().__init__(config)
        self._about = about

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _log.info("serving", extra=self._about)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


async def _run(app: Any, bound: socket.socket, options: dict[str, Any], service: Service) -> None:
    under_way = service.under_way
    behind = options["insecure_http"] or _is_loopback(options["host"])
    connections = _descriptors() // 2  # the other half is for the service's own work
    config = uvicorn.Config(
        app,
        http=limited(BEHIND_A_PROXY if behind else PER_ADDRESS, connections),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=GRACE_S,
        ssl_certfile=options["tls_cert"],
        ssl_keyfile=options["tls_key"],
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise RequestError(f"the certificate or its key cannot be used: {error.strerror or error}") from None
    scheme, port = "https" if options["tls_cert"] else "http", bound.getsockname()[1]
    name = f"[{options['host']}]" if ":" in options["host"] else options["host"]
    backend = service.platform.backend
    about = {"version": version("airlock"), "backend": backend.name, "isolation": backend.isolation.name}
    server = _Server(config, {"url": f"{scheme}://{name}:{port}", **about})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_stopped_by_signals, server, service, tasks)
        tasks.start_soon(_stopped_by_loss, server, service)
        tasks.start_soon(keep_swept, service)
        await server.serve(sockets=[bound])
        tasks.cancel_scope.cancel()
    if under_way.lost.is_set():
        raise StoreError("the connection to the database broke: what was under way is gone on with by the next start")


def _raise_descriptors() -> None:
    """Have as many as the machine permits: what a shell gives is meant for programs that count them with select."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # the kernel's own limit may be below the hard one by now
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _descriptors() -> int:
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


async def _stopped_by_loss(server: uvicorn.Server, service: Service) -> None:
    await service.under_way.lost.wait()
    service.feed.stop()
    server.should_exit = True


async def _stopped_by_signals(server: uvicorn.Server, service: Service, tasks: TaskGroup) -> None:
    """The first signal: take nothing more on, see running queries to their end in their time. A second: at once.

    A SIGHUP (the terminal was closed) that we were started to ignore, as nohup does, stays ignored.
    """
    stopping = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        stopping.append(signal.SIGHUP)
    with anyio.open_signal_receiver(*stopping) as signals:
        async for _number in signals:
            if service.under_way.draining:
                service.under_way.hurry()
            else:
                _log.info("stopping: no more queries are taken on")
                tasks.start_soon(_drained, server, service)


async def _drained(server: uvicorn.Server, service: Service) -> None:
    await service.under_way.drain()
    service.feed.stop()
    server.should_exit = True
