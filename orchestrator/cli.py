"""The command line: `airlock run | exec | models | images | doctor | policy | audit | serve | tenants | keys`.

The answer alone goes to standard output, progress to standard error. Errors are one line; exit codes are in `_EXIT`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import click
from click.core import ParameterSource

from orchestrator import settings
from orchestrator.audit_commands import audit
from orchestrator.core import limits
from orchestrator.core.errors import AirlockError, RequestError
from orchestrator.core.policy import IMAGES
from orchestrator.files import Unreadable, read_text
from orchestrator.named_policy import load_policy
from orchestrator.streams import answer_lost, open_standard_streams
from orchestrator.tenant_commands import keys, tenants

F = TypeVar("F", bound=Callable[..., Any])

_EXIT = """\
Exit codes: 0 answered; 1 the cell raised an exception (exec); 2 usage or input; 3 stopped by a limit or refused by
policy; 4 sandbox, or another part of this machine; 5 provider; 130 interrupted."""
_BACKENDS = "How the sandbox is isolated: bubblewrap, docker, gvisor; auto: the strongest usable."
_DEPTH = "0: no sub-calls; 1: plain ones; 2 and more: child queries with a sandbox of their own."
_POLICIES = "default, strict, development, or a file."
_HERE_ALONE = ("resume", "base_url", "prices", "backend", "policy")
_WITH_RESUME = ("resume", "base_url", "api_key_env", "prices", "backend", "as_json")
_LOOP = {"use_uvloop": True}  # a sixth less time for a query of many calls


class _Checked(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  generic in the stubs alone
    """Text through a check of `core.limits`, to an exact whole number."""

    def __init__(self, name: str, check: Callable[[Any], int], read: Callable[[str], Any] = str) -> None:
        self.name, self._check, self._read = name, check, read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            given = self._read(value)
        except ValueError:
            given = value
        try:
            return self._check(given)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _model_options(function: F) -> F:
    """What is asked, where it runs, and what it may."""
    return _with(
        function,
        click.option("--model", metavar="MODEL", help="NAME, local:NAME, local:/path/to.gguf or scripted:FILE."),
        click.option(
            "--sub-model",
            "sub_models",
            multiple=True,
            metavar="MODEL",
            help="The model that sub-calls ask; default: --model. Repeated: one for each depth.",
        ),
        click.option("--base-url", metavar="URL", help="An OpenAI-compatible server; default: OpenAI's."),
        click.option("--api-key-env", metavar="NAME", help="The environment variable that holds the key."),
        click.option(
            "--price", "prices", multiple=True, metavar="MODEL=IN,OUT", help="USD per million tokens; may be repeated."
        ),
        click.option("--backend", metavar="NAME", default="auto", show_default=True, help=_BACKENDS),
        click.option("--policy", metavar="POLICY", default="default", show_default=True, help=_POLICIES),
    )


def _query_options(function: F) -> F:
    """What is said of one query."""
    told = _with(
        function,
        click.option(
            "--encoding",
            type=click.Choice(["utf-8", "latin-1", "replace"]),
            default="utf-8",
            show_default=True,
            help="Of the context; replace: UTF-8, with what is none replaced.",
        ),
        click.option(
            "--budget",
            type=_Checked("USD", limits.budget),
            help="The most it may cost, in USD.",
        ),
        click.option(
            "--timeout",
            type=_Checked("SECONDS", limits.timeout, float),
            help="The most it may take.",
        ),
        click.option("--depth", type=_Checked("N", partial(limits.count, least=0), int), help=_DEPTH),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the answer."),
    )
    return _model_options(told)


def _with(function: F, *options: Callable[[F], F]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def _context_option(*, required: bool) -> Callable[[F], F]:
    text = "Text, .json, .jsonl, a folder, or - for standard input."
    return click.option("--context", metavar="PATH", required=required, help=text)


@click.group(epilog=_EXIT, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="airlock", message="airlock %(version)s")
def app() -> None:
    """Recursive Language Model queries over untrusted context: isolated, bounded, on record."""


@app.command()
@click.argument("question", required=False, metavar="QUESTION")
@_context_option(required=False)
@click.option("--answer-schema", type=click.Path(path_type=Path), metavar="FILE", help="A JSON Schema for the answer.")
@click.option("--server", metavar="URL", help="Have a service run it; its key is in AIRLOCK_API_KEY or --api-key-env.")
@click.option("--resume", metavar="QUERY", help="Go on with a query whose process died, instead of a new one.")
@_query_options
@click.pass_context
def run(
    ctx: click.Context,
    question: str | None,
    answer_schema: Path | None,
    server: str | None,
    resume: str | None,
    **options: Any,
) -> int:
    """Answer QUESTION over a context."""
    from orchestrator.choices import load_schema

    if resume is not None and server is None:
        from orchestrator import runs  # loaded by the commands that need it: it takes longer than others do in all

        told = {param.name or "" for param in ctx.command.params} - set(_WITH_RESUME)
        _refuse(ctx, told, "--resume: the journal has what the query was asked")
        return anyio.run(runs.resume, resume, options, backend_options=_LOOP)
    _require(ctx, "question", question)
    _require(ctx, "context", options["context"])
    assert question is not None
    schema = load_schema(answer_schema) if answer_schema else None
    if server is not None:
        from orchestrator import remote_runs

        _refuse(ctx, _HERE_ALONE, "--server: the service has what it runs queries with")
        return remote_runs.run(server, question, options, schema)
    from orchestrator import runs

    return anyio.run(runs.run, question, options, schema, backend_options=_LOOP)


def _refuse(ctx: click.Context, names: Collection[str], why: str) -> None:
    """These, where they were given."""
    for param in ctx.command.params:
        if param.name in names and ctx.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE:
            name = param.opts[0] if isinstance(param, click.Option) else "a question"
            raise click.UsageError(f"{name} does not go with {why}.", ctx)


def _require(ctx: click.Context, name: str, value: object) -> None:
    """What is needed unless --resume is given."""
    if value is None:
        raise click.MissingParameter(ctx=ctx, param=next(param for param in ctx.command.params if param.name == name))


@app.command(name="exec")
@click.argument("file", type=click.Path(path_type=Path))
@_context_option(required=False)
@_query_options
def exec_(file: Path, **options: Any) -> int:
    """Run FILE as one cell, without a root LM.

    Its sub-calls go to --model. Without --context, `context` is an empty str.
    """
    try:
        code = read_text(file)
    except Unreadable as why:
        raise RequestError(f"cannot read {file}: {why}") from None
    from orchestrator import runs

    return anyio.run(runs.run_cell, code, options, backend_options=_LOOP)


@app.group()
def models() -> None:
    """Models on this machine."""


@models.command(name="pull")
@click.argument("name", default="qwen2.5-coder-1.5b")
def models_pull(name: str) -> None:
    """Fetch the weights of a model (resumable, checked by hash)."""
    from orchestrator.lm import weights

    if name not in weights.KNOWN:
        raise RequestError(f"there is no model {name!r} to pull; there are: {', '.join(weights.KNOWN)}")
    folder = settings.home() / "models"
    if name in weights.installed(folder):
        click.echo(f"{name} is there already: {weights.path_of(folder, name)}", err=True)
        return
    path = _pull_with_progress(folder, weights.KNOWN[name])
    click.echo(f"{name} is ready: --model local:{name}  ({path})", err=True)


def _pull_with_progress(folder: Path, known: Any) -> Path:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from orchestrator.lm import weights

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(known.name, total=known.size)
        return weights.pull(
            folder, lambda done, total: progress.update(task, completed=done, total=total), weights=known
        )


@models.command(name="list")
def models_list() -> None:
    """What is on this machine, and what can be pulled."""
    from orchestrator.lm import weights

    folder = settings.home() / "models"
    installed = weights.installed(folder)
    for name, path in installed.items():
        click.echo(f"local:{name}\t{path.stat().st_size / 2**20:,.0f} MiB\t{path}")
    for name, known in weights.KNOWN.items():
        if name not in installed:
            click.echo(f"{name}\t{known.size / 2**20:,.0f} MiB\tnot here: airlock models pull {name}")


@app.command()
@click.option("--backend", help="One alone; default: all that there are.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(backend: str | None, as_json: bool) -> int:
    """Say what works on this machine, what does not, and why."""
    from orchestrator.doctor import report

    return anyio.run(partial(report, settings.home(), backend, as_json=as_json))


@app.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any that is free.")
@click.option("--tls-cert", type=click.Path(exists=True, dir_okay=False), help="The certificate, and its chain (PEM).")
@click.option("--tls-key", type=click.Path(exists=True, dir_okay=False), help="Its private key (PEM).")
@click.option("--insecure-http", is_flag=True, help="Serve other machines without TLS: a proxy in front does that.")
@click.option(
    "--log", type=click.Choice(["json", "plain"]), default="json", show_default=True, help="On standard error."
)
@_model_options
def serve(**options: Any) -> int:
    """Serve queries of many tenants over HTTP, and pages to watch them on."""
    from orchestrator import runs
    from orchestrator.serving import serve as serve_until_stopped

    return anyio.run(serve_until_stopped, options, runs.platform_choices(options), backend_options=_LOOP)


@app.group()
def images() -> None:
    """The images that containers run."""


@images.command(name="build")
@click.argument("name", default=IMAGES[0], metavar=f"[{'|'.join(IMAGES)}]")
@click.option("--offline", is_flag=True, help="From Debian packages, where no registry is reached.")
def images_build(name: str, offline: bool) -> None:
    """Build an image with the Docker engine of this machine, and put it on record."""
    from orchestrator.sandbox.registry import build_image

    click.echo(build_image(settings.home(), name, offline=offline, say=lambda text: click.echo(text, err=True)))


@images.command(name="lock")
def images_lock() -> None:
    """Print versions.lock with the newest packages."""
    from tempfile import TemporaryDirectory

    from orchestrator.sandbox.registry import images as images_of

    with TemporaryDirectory(prefix="airlock-lock-") as folder:
        click.echo(images_of(settings.home()).lock(Path(folder)), nl=False)


@app.group()
def policy() -> None:
    """Policies: what a query may do."""


@policy.command(name="check")
@click.argument("file")
def policy_check(file: str) -> None:
    """Check a policy FILE; every fault is told with its line."""
    click.echo(f"{file}: valid, SHA-256 {load_policy(file).sha256()}")


@policy.command(name="show")
@click.option("--policy", "name", metavar="POLICY", default="default", show_default=True, help=_POLICIES)
def policy_show(name: str) -> None:
    """Print a policy as it is in force."""
    import yaml

    shown = load_policy(name)
    click.echo(f"# {name}, SHA-256 {shown.sha256()}")
    click.echo(yaml.safe_dump(shown.model_dump(mode="json"), sort_keys=False), nl=False)


for group in (audit, tenants, keys):
    app.add_command(group)


def main() -> None:
    """The entry point `airlock`."""
    open_standard_streams()
    try:
        code = app.main(prog_name="airlock", standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = 2
    except click.ClickException as error:
        click.echo(f"airlock: {error.format_message()}{_where_to_look(error)}", err=True)
        code = 2
    except BaseExceptionGroup as group:
        error = _first(group)
        if not isinstance(error, AirlockError):
            raise
        click.echo(f"airlock: {error}", err=True)
        code = error.exit_code
    except AirlockError as error:
        click.echo(f"airlock: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:  # the reader of standard output has gone; say nothing more
        code = 1
    except OSError as error:
        if not answer_lost():
            raise
        click.echo(f"airlock: standard output cannot be written: {error.strerror}", err=True)
        code = 4
    gc.freeze()  # else the interpreter looks through all that there is for garbage once more: a quarter of a second
    sys.exit(code)


def _where_to_look(error: click.ClickException) -> str:
    """The page that lists what there is, after a word that is not there or lacks."""
    known = isinstance(error, click.BadParameter) and not isinstance(error, click.MissingParameter)
    if known or not isinstance(error, click.UsageError) or error.ctx is None:
        return ""
    return f" See `{error.ctx.command_path} --help`."


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return error  # pyright: ignore[reportUnknownVariableType]


if __name__ == "__main__":
    main()
