r"""What secrets look like: the published formats of tokens, and the places where people write passwords.

A form is looked at only where one of its anchors is. Its pattern takes what it has taken for good (possessive
quantifiers, of single characters: those of groups lose their place in Python 3.11.2), and is bounded or stops at what
the next anchor needs: no text takes long. Texts may be JSON, so a quote may come as \" and a line may begin after the
two characters \n.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.core.api_keys import parse_key


def _anything(_secret: bytes) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Form:
    """One kind of secret.

    anchors: in lower case; one of them is where `pattern` begins, in any case, or what it begins behind. pattern: its
    group is the secret, or all of it where there is none. check: whether that is one, beyond what a pattern can tell.
    """

    kind: str
    anchors: tuple[str, ...]
    pattern: re.Pattern[bytes]
    check: Callable[[bytes], bool] = _anything
    behind: bool = False


_PIECE = re.compile(rb"[0-9]+|[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_STRETCH = re.compile(rb"[A-Za-z0-9]{16,}")
_NUMBER = re.compile(rb"[0-9]+")


def looks_random(value: bytes) -> bool:
    """Whether it was drawn rather than written: many different characters, and letters and digits all mixed up.

    Names that people write have words in them, and few numbers: getTokenFromBase64String, us-east-1, Ed25519PublicKey.
    """
    value = value[:512]
    solid = value.translate(None, b"+/_=.~-")
    digits = _digits(solid)
    if len(set(solid)) < 8 or not 0 < digits < len(solid):
        return False
    if len(solid) <= 3 * len(_PIECE.findall(solid)):
        return True
    return any(3 <= _digits(part) < len(part) and len(_NUMBER.findall(part)) > 1 for part in _STRETCH.findall(value))


def _is_numbered(value: bytes) -> bool:
    """Slack's have the numbers of a workspace and of a user in them."""
    return _digits(value) >= 8


def _digits(value: bytes) -> int:
    return len(value) - len(value.translate(None, b"0123456789"))


def _is_airlock_key(value: bytes) -> bool:
    """One of ours has a checksum; one in a few thousand does not look random."""
    return parse_key(value.decode("ascii", "replace")) is not None or looks_random(value)


def _is_credentials(value: bytes) -> bool:
    """Of a Basic header: text with a colon in it, in base64."""
    try:
        text = base64.b64decode(value, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return False
    return ":" in text and text.isprintable()


def _is_jwt(value: bytes) -> bool:
    """Whether its first part is a JOSE header."""
    head = value.split(b".", 1)[0]
    try:
        fields: object = json.loads(base64.urlsafe_b64decode(head + b"=" * (-len(head) % 4)))
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and "alg" in fields


# A token stands alone: in the middle of base64 or of a slug there is none. An escaped line end may come before it.
_START = rb"(?:(?<![A-Za-z0-9_-])|(?<=\\[nrtbf]))"
_END = rb"(?![A-Za-z0-9_-])"


def _token(kind: str, anchors: str, body: str, check: Callable[[bytes], bool] = _anything) -> Form:
    """One that begins with its anchor. anchors: as issued, with spaces between them."""
    names = anchors.split()
    begin = b"|".join(re.escape(name.encode()) for name in names)
    pattern = re.compile(_START + b"(?:" + begin + b")" + body.encode() + _END)
    return Form(kind, tuple(name.lower() for name in names), pattern, check)


# Where a value is written beside its name. A value holds none of the characters that part it from a name.
_QUOTE = rb"""\\{0,3}+["'`]"""
_VALUE = rb"([A-Za-z0-9+/_.~-]{16,}+={0,2})"
_BETWEEN = rb"(?:%b)?\]?[ \t]{0,8}+(?:: ?str ?+)?(?:=>|:=|==?|[:>,])[ \t]{0,8}+(?:[bru]{0,2}%b)?" % (_QUOTE, _QUOTE)
_OWNERS = [
    "api",
    "access",
    "secret",
    "private",
    "account",
    "auth",
    "client",
    "signing",
    "encryption",
    "master",
    "shared",
]
_NAMES = (
    *("password", "passwd", "passphrase", "pwd", "secret", "token"),
    *(f"{owner}{between}key" for owner in _OWNERS for between in ("", "_", "-")),
)
_PEM_LINE = rb"(?:(?:\s|\\[nr]){1,4}[A-Za-z0-9+/=]{16,}+)"

FORMS = (
    Form(
        "private key",
        ("-----begin ",),
        re.compile(
            rb"-----BEGIN (?:[A-Z0-9]{1,16} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
            # To its end; where that was cut off, all lines that can be of it.
            rb"(?:[^-]{0,32768}+(?:-(?!----)[^-]{0,1024}+){0,64}-----END [A-Z0-9 ]{1,60}-----|"
            + _PEM_LINE
            + rb"{1,1000})"
        ),
    ),
    Form(
        "bearer token",
        ("bearer",),
        re.compile(_START + rb"(?i:bearer)\s{1,4}+([A-Za-z0-9+/_.~-]{12,}+={0,2})"),
        looks_random,
    ),
    Form(
        "basic credentials",
        ("basic ",),
        re.compile(_START + rb"(?i:basic)\s{1,4}+([A-Za-z0-9+/]{6,1000}+={0,2})"),
        _is_credentials,
    ),
    Form(
        "authorization header",
        ("authorization",),
        re.compile(
            rb"(?<![A-Za-z])(?i:authorization)"
            + _BETWEEN
            + rb"(?!(?i:bearer|basic) )(?:[A-Za-z-]{1,20}+ {1,4}+)?"
            + _VALUE
        ),
        looks_random,
    ),
    Form(
        "password in a URL",
        ("://",),
        # What a template has in its place ({password}, $PASSWORD, %s, <password>, ***) is none.
        re.compile(rb"""://[^\s/:@?#\[\]"'<>\\]{0,128}+:(?![{$*<]|%[s(])([^\s/\[\]"'<>\\]{1,256})@[A-Za-z0-9]"""),
    ),
    _token("Airlock key", "al_", "[A-Za-z0-9]{4,40}+_[A-Za-z0-9_-]{16,120}+", _is_airlock_key),
    _token("Airlock key", "airlock_", "[A-Za-z0-9_-]{20,160}+", looks_random),
    _token("Anthropic key", "sk-ant-", "[A-Za-z0-9_-]{20,250}+", looks_random),
    _token("API key", "sk-", "(?!ant-)[A-Za-z0-9_-]{20,250}+", looks_random),  # OpenAI's, and those made like them
    _token("API key", "gsk_ xai- pplx- r8_ fw_", "[A-Za-z0-9]{20,200}+", looks_random),
    _token("AWS key", "AKIA ASIA", r"""[A-Z0-9]{16}+(?:[\s,;:|"']{1,8}+[A-Za-z0-9/+]{40}+(?![A-Za-z0-9/+=]))?"""),
    _token("Azure key", "AccountKey= SharedAccessKey=", "([A-Za-z0-9+/]{40,100}+={0,2})"),
    _token("Azure signature", "sig=", "([A-Za-z0-9+/%]{40,100}+={0,2})", looks_random),
    _token("DigitalOcean token", "dop_v1_ doo_v1_ dor_v1_", "[0-9a-f]{64}+"),
    _token("GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_", "[A-Za-z0-9_]{36,255}+"),
    _token("GitHub token", "github_pat_", "[A-Za-z0-9_]{50,255}+"),
    _token(
        "GitLab token",
        "glpat- gloas- gldt- glrt- glptt- glcbt- glft- glagent- glimt- glsoat-",
        r"[A-Za-z0-9_-]{20,300}+(?:\.[a-z0-9]{2}\.[a-z0-9]{7,9}+)?",
    ),
    _token("Google key", "AIza", "[A-Za-z0-9_-]{35}+"),
    _token("Google token", "ya29. GOCSPX-", "[A-Za-z0-9_-]{20,400}+", looks_random),
    _token("Hugging Face token", "hf_ api_org_", "[A-Za-z0-9]{34,40}+"),
    _token("npm token", "npm_", "[A-Za-z0-9]{36}+"),
    _token("PyPI token", "pypi-Ag", "[A-Za-z0-9_-]{50,1000}+"),
    _token("SendGrid key", "SG.", r"[A-Za-z0-9_-]{22}+\.[A-Za-z0-9_-]{43}+"),
    _token("Shopify token", "shpat_ shpca_ shppa_ shpss_", "[0-9a-fA-F]{32}+"),
    _token("Slack token", "xoxa- xoxb- xoxe- xoxo- xoxp- xoxr- xoxs- xapp-", "[A-Za-z0-9-]{20,250}+", _is_numbered),
    _token("Slack webhook", "hooks.slack.com/services/", "([A-Za-z0-9/]{30,120}+)"),
    _token("Stripe key", "sk_live_ sk_test_ rk_live_ rk_test_ whsec_", "[A-Za-z0-9+/]{16,250}+"),
    _token("Vault token", "hvs. hvb.", "[A-Za-z0-9_-]{24,300}+"),
    Form("Telegram token", (":aa",), re.compile(rb"(?<=[0-9]{8}):(AA[A-Za-z0-9_-]{33})" + _END)),
    Form(
        "Twilio key",
        tuple(f"sk{digit:x}" for digit in range(16)),
        re.compile(_START + rb"SK[0-9a-f]{32}+" + _END),
    ),
    Form(
        "JWT",
        ("eyj",),
        # Three parts, five where it is encrypted.
        re.compile(
            _START + rb"eyJ[A-Za-z0-9_-]{8,8000}+\.[A-Za-z0-9_-]{0,32768}+(?:\.[A-Za-z0-9_-]{1,32768}+){1,3}+" + _END
        ),
        _is_jwt,
    ),
    Form(
        "secret value",
        _NAMES,
        re.compile(_BETWEEN + _VALUE + rb"(?![(\[])"),  # the name of a function or a table is no value
        looks_random,
        behind=True,
    ),
)
