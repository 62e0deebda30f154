"""Backends by name: imported when used, strongest last, `auto` for the strongest that this machine and policy allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from orchestrator import settings
from orchestrator.core.errors import NotPermitted, RequestError, SandboxUnusable
from orchestrator.core.policy import IMAGES
from orchestrator.sandbox.base import Backend, Isolation
from orchestrator.sandbox.images import Images
from orchestrator.sandbox.runtimes import RUNTIMES

_ISOLATION = {"bubblewrap": Isolation.namespace, **{runtime.backend: runtime.isolation for runtime in RUNTIMES}}
NAMES = tuple(_ISOLATION)


def make_backend(name: str, *, least: str, home: Path, image: str = IMAGES[0]) -> Backend:
    """The backend called `name`, or, for `auto`, the strongest that is usable. home: the data folder.

    Raises RequestError for an unknown name, NotPermitted when the policy asks for more isolation than it gives or for
    an image that it has not, SandboxUnusable when it cannot be loaded, or `auto` finds none. Neither weaker isolation
    than `least` nor another image is ever picked.
    """
    if name == "auto":
        return _strongest(least, home, image)
    if name not in NAMES:
        raise RequestError(f"there is no backend {name!r}; there are {', '.join(NAMES)} and auto")
    if _ISOLATION[name] < Isolation[least]:
        raise NotPermitted(
            f"the policy asks for isolation of at least {least!r}, and backend {name} gives {_ISOLATION[name].name!r}",
            limit=least,
            asked=_ISOLATION[name].name,
        )
    return _make(name, home, image)


def _strongest(least: str, home: Path, image: str) -> Backend:
    enough = [name for name in reversed(NAMES) if _ISOLATION[name] >= Isolation[least]]
    why: list[str] = []
    for name in enough:
        try:
            backend = _make(name, home, image)
            backend.require_usable()
        except (SandboxUnusable, NotPermitted) as error:
            why.append(f"{name}: {error}")
        else:
            return backend
    said = "; ".join(why) or "there is none"
    raise SandboxUnusable(f"no backend with isolation of at least {least!r}, which the policy asks for: {said}")


def _make(name: str, home: Path, image: str) -> Backend:
    if name == "bubblewrap" and image != IMAGES[0]:
        raise NotPermitted(
            f"the policy asks for image {image!r}, and backend bubblewrap has this machine's Python: take a container",
            limit=image,
            asked=name,
        )
    seccomp = settings.data_folder("policies") / "seccomp.json"
    try:
        if name == "bubblewrap":
            from orchestrator.sandbox.bubblewrap import Bubblewrap

            return Bubblewrap(home / "cache", seccomp)
        from orchestrator.sandbox.docker import Docker

        (runtime,) = (runtime for runtime in RUNTIMES if runtime.backend == name)
        runtime = replace(runtime, name=settings.load_config(home).runtimes.model_dump()[name])
        return Docker(partial(images(home).expected, image), seccomp, runtime, settings.docker_socket())
    except ValueError as error:
        raise SandboxUnusable(str(error)) from None
    except ImportError as error:
        extra = "" if name == "bubblewrap" else ", with the extra `docker`"
        raise SandboxUnusable(f"backend {name} cannot be loaded: {error}; install Airlock again{extra}") from None


def pool_size(sizes: Mapping[str, int], backend: Backend) -> int:
    """How many sandboxes of `backend` to keep ready, from sizes by backend or isolation level. Raises RequestError."""
    for name in sizes:
        if name not in NAMES and name not in Isolation.__members__:
            known = ", ".join([*NAMES, *Isolation.__members__])
            raise RequestError(f"airlock.toml: pool.size.{name}: no backend or isolation level; there are {known}")
    return sizes.get(backend.name, sizes.get(backend.isolation.name, 0))


def build_image(home: Path, name: str = IMAGES[0], *, offline: bool, say: Callable[[str], None]) -> str:
    """Build an image of containers, and put it on record; its id. Raises RequestError, SandboxUnusable."""
    try:
        from orchestrator.sandbox.docker import engine

        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with engine(settings.docker_socket()) as api:
            return images(home).build(api, name, offline=offline, say=say)
    except (ImportError, ValueError, OSError) as error:
        raise SandboxUnusable(f"the image cannot be built: {error}") from None


def images(home: Path) -> Images:
    return Images(home / "images.json", settings.data_folder("sandbox_images"))
