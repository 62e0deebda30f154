"""From a model's name to the LM that it stands for: what the operator configured, and what a user chose."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path

from orchestrator import settings
from orchestrator.choices import Choices
from orchestrator.core import address
from orchestrator.core.errors import ModelError
from orchestrator.core.policy import Policy
from orchestrator.lm.base import LM
from orchestrator.loop.prompts import RootLimits

MOST_NAMES = 3072  # bytes of JSON, of the names of a query's models: records hold them, and are bounded
MOST_MODELS = 32  # of a query, and so are their servers
NO_KEY = "none"  # what servers that need none are told
LOCAL_PROMPT_BYTES = 14 * 1024  # of a window of 8,192 tokens, at 2.5 bytes a token, less the output
LOCAL_OUTPUT_TOKENS = 512
LOCAL_SHOWN_CHARS = 1500
NO_MODEL = """no model is configured. The choices are:
  --model local:qwen2.5-coder-1.5b     on this machine, free; fetch it first with `airlock models pull`
  --model NAME [--base-url URL]        any OpenAI-compatible server; its key in OPENAI_API_KEY or --api-key-env NAME"""


class Models:
    """The models of one platform. default: what is asked where a query names none; sub: likewise, by depth."""

    def __init__(self, home: Path, config: settings.Config, choices: Choices) -> None:
        self._home, self._config, self._choices = home, config, choices
        self.default = choices.model or config.model or ""
        self.sub = list(choices.sub_models) or _listed(config.sub_model) or _listed(self.default or None)
        self._lms: dict[str, LM] = {}

    @property
    def prices(self) -> Mapping[str, tuple[Decimal, Decimal]]:
        """What the operator says, in USD per million tokens."""
        return {**self._config.prices, **self._choices.prices}

    @property
    def named(self) -> list[str]:
        """Those that the operator's configuration or the command line names."""
        configured = [*_listed(self._config.model), *_listed(self._config.sub_model), *self._config.models]
        return [name for name in dict.fromkeys((self.default, *self.sub, *configured)) if name]

    def secrets(self) -> list[str]:
        """What this process holds for its models and nobody else may read."""
        models = self._config.models.values()
        variables = {self._config.api_key_env, self._choices.api_key_env, *(own.api_key_env for own in models)}
        found = [settings.api_key(name) for name in variables if name]
        given = [self._choices.api_key]
        servers = [self._choices.base_url, self._config.base_url, *(own.base_url for own in models)]
        given += [address.secret(server) for server in servers if server]
        return [*(secret.get_secret_value() for secret in found if secret), *filter(None, given)]

    def require(self, names: Iterable[str]) -> None:
        """That all of a query's models are there. Raises ModelError."""
        listed = list(names)
        if len(listed) > MOST_MODELS:
            text = f"{len(listed)} models are named, and a query has at most {MOST_MODELS}: name fewer of them"
            raise ModelError(text)
        if len(json.dumps(listed)) > MOST_NAMES:
            text = f"the names of the models have more than {MOST_NAMES:,} bytes together: name fewer of them"
            raise ModelError(text)
        for name in listed:
            if not name.isprintable():
                raise ModelError(f"{name!r} is not the name of a model")
            self.find(name)

    def find(self, name: str) -> tuple[LM, str]:
        """The LM that a model's name stands for, and the provider's name for the model. Raises ModelError."""
        if name not in self._lms:
            self._lms[name] = self._make(name)
        return self._lms[name], name

    def _make(self, name: str) -> LM:
        kind, _, rest = name.partition(":")
        if kind == "scripted":
            from orchestrator.lm.scripted import ScriptedLM

            return ScriptedLM(Path(rest))
        if kind == "local":
            from orchestrator.lm.local import LocalLM, find

            return LocalLM(find(rest, self._home / "models"))
        from orchestrator.lm.openai import OpenAILM

        own = self._own(name)
        base_url = self._base_url(name)
        variable = self._choices.api_key_env or own.api_key_env or self._config.api_key_env
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise ModelError(
                f"the server of {name} has to be an address with http:// or https://, not {address.shown(base_url)!r}"
            )
        key = self._choices.api_key
        if key is None:
            secret = settings.api_key(variable)
            # A server of one's own needs no key unless one is named.
            if secret is None and (base_url is None or self._choices.api_key_env or own.api_key_env):
                raise ModelError(
                    f"there is no API key for {name}: set {variable}, or name a variable with --api-key-env"
                )
            key = secret.get_secret_value() if secret else NO_KEY
        if not (key.isascii() and key.isprintable()):
            raise ModelError(f"the API key for {name} has characters that no key has: look at {variable} again")
        return OpenAILM(base_url, key, own.extra)

    def _own(self, name: str) -> settings.ModelSettings:
        return self._config.models.get(name, settings.ModelSettings())

    def _base_url(self, name: str) -> str | None:
        """None for OpenAI's own. What is said with the query goes before what the file says: a key given for one server
        is for that one.
        """
        return self._choices.base_url or self._own(name).base_url or self._config.base_url

    def server(self, name: str) -> str | None:
        """Which server a model is at, as a hash; None for one of this process."""
        if name.startswith(("scripted:", "local:")):
            return None
        from orchestrator.lm.openai import OPENAI

        return address.digest(self._base_url(name) or OPENAI)

    def limits(self, model: str, policy: Policy) -> RootLimits:
        """What the LM can take as the root of a loop, under a policy."""
        own = self._own(model)
        local = model.startswith("local:")
        prompt = own.prompt_bytes or (LOCAL_PROMPT_BYTES if local else policy.models.prompt)
        output = own.output_tokens or (LOCAL_OUTPUT_TOKENS if local else policy.models.output_tokens)
        shown = LOCAL_SHOWN_CHARS if local else policy.sandbox.shown
        return RootLimits(
            prompt_bytes=min(prompt, policy.models.prompt),
            output_tokens=min(output, policy.models.output_tokens),
            shown_chars=min(shown, policy.sandbox.shown),
            style=own.style or ("small" if local else "standard"),
        )

    async def aclose(self) -> None:
        for lm in self._lms.values():
            await lm.aclose()


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else names or []
