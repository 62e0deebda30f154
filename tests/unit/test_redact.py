"""Secrets go, in whatever way they are written; ordinary text stays; and no text takes long.

The secrets are drawn here, in the published formats: none is a real one, and none stands in this file.
"""

from __future__ import annotations

import base64
import json
import random
import string
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.redact import Redactor, mark
from orchestrator.core.secret_forms import FORMS, looks_random

PROJECT = Path(__file__).parents[2]
UPPER, LOWER, DIGITS = string.ascii_uppercase, string.ascii_lowercase, string.digits
HEX, ALNUM = "0123456789abcdef", string.ascii_letters + DIGITS
URLSAFE, BASE64 = ALNUM + "-_", ALNUM + "+/"
redactor = Redactor()


class Draw:
    """The same secrets in every run."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  not to be secret

    def __call__(self, alphabet: str, length: int) -> str:
        return "".join(self._random.choices(alphabet, k=length))

    def data(self, length: int) -> bytes:
        return self._random.randbytes(length)


def urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def jwt(draw: Draw, parts: int = 2) -> str:
    header = urlsafe(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
    return ".".join([header, *(urlsafe(draw.data(40)) for _ in range(parts))])


def pem(draw: Draw, kind: str = "RSA PRIVATE KEY", end: str = "\n") -> str:
    body = base64.b64encode(draw.data(600)).decode()
    lines = [body[at : at + 64] for at in range(0, len(body), 64)]
    return end.join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----"])


TOKENS: dict[str, list[Callable[[Draw], str]]] = {
    "OpenAI": [
        lambda d: "sk-" + d(ALNUM, 20) + "T3BlbkFJ" + d(ALNUM, 20),
        lambda d: "sk-proj-" + d(URLSAFE, 74) + "T3BlbkFJ" + d(URLSAFE, 73) + "A",
        lambda d: "sk-svcacct-" + d(URLSAFE, 60) + "x",
    ],
    "made like OpenAI's": [lambda d: "sk-" + d(HEX, 32), lambda d: "sk-or-v1-" + d(HEX, 64)],
    "Anthropic": [
        lambda d: "sk-ant-api03-" + d(URLSAFE, 93) + "AA",
        lambda d: "sk-ant-admin01-" + d(URLSAFE, 93) + "AA",
    ],
    "Google": [lambda d: "AIza" + d(URLSAFE, 35), lambda d: "ya29." + d(URLSAFE, 120)],
    "AWS": [lambda d: "AKIA" + d(UPPER + "234567", 16), lambda d: "ASIA" + d(UPPER + "234567", 16)],
    "GitHub": [
        lambda d: "ghp_" + d(ALNUM, 36),
        lambda d: "gho_" + d(ALNUM, 36),
        lambda d: "github_pat_" + d(ALNUM, 22) + "_" + d(ALNUM, 59),
    ],
    "GitLab": [
        lambda d: "glpat-" + d(URLSAFE, 20),
        lambda d: "glpat-" + d(URLSAFE, 27) + ".01." + d(LOWER + DIGITS, 9),
    ],
    "Slack": [
        lambda d: f"xoxb-{d(DIGITS, 12)}-{d(DIGITS, 13)}-{d(ALNUM, 24)}",
        lambda d: f"xoxp-{d(DIGITS, 12)}-{d(DIGITS, 12)}-{d(DIGITS, 12)}-{d(HEX, 32)}",
        lambda d: f"xapp-1-A{d(UPPER + DIGITS, 10)}-{d(DIGITS, 13)}-{d(HEX, 64)}",
    ],
    "Stripe": [lambda d: "sk_live_" + d(ALNUM, 24), lambda d: "rk_live_" + d(ALNUM, 99)],
    "Hugging Face": [lambda d: "hf_" + d(UPPER + LOWER, 34)],
    "npm": [lambda d: "npm_" + d(ALNUM, 36)],
    "PyPI": [lambda d: "pypi-AgEIcHlwaS5vcmcC" + d(URLSAFE, 150)],
    "SendGrid": [lambda d: f"SG.{d(URLSAFE, 22)}.{d(URLSAFE, 43)}"],
    "Twilio": [lambda d: "SK" + d(HEX, 32)],
    "Vault": [lambda d: "hvs." + d(URLSAFE, 90)],
    "Groq": [lambda d: "gsk_" + d(ALNUM, 52)],
    "Airlock": [lambda d: f"al_{d(LOWER + DIGITS, 12)}_{d(URLSAFE, 43)}", lambda d: "airlock_" + d(URLSAFE, 43)],
    "JWT": [jwt, lambda d: jwt(d, 4)],
    "PEM": [
        pem,
        lambda d: pem(d, "PRIVATE KEY"),
        lambda d: pem(d, "OPENSSH PRIVATE KEY"),
        lambda d: pem(d, "PGP PRIVATE KEY BLOCK"),
        lambda d: pem(d, end="\r\n"),
    ],
}
# What stands around a token: "@" is where it is.
AROUND = [
    "@",
    "The key is @.",
    "(@)",
    "KEY=@\n",
    'client = Client("@")',
    "https://host/path?key=@&more=1",
    '{"key": "@", "more": 1}',
    r'[{"role": "user", "content": "first line\n@\nlast line"}]',  # a prompt, as it is stored
    r"He said \"@\", and left.",
]
WRITTEN = [  # where only the name tells; "@" is 20 random letters and digits
    'api_key = "@"',
    "OPENAI_API_KEY=@",
    "export CLIENT_SECRET='@'",
    '{"apiKey": "@"}',
    r'[{"content": "{\"access_token\": \"@\"}"}]',
    "x-api-key: @",
    "password: @\n",
    'os.environ["DB_PASSWORD"] = "@"',
    'token: str = "@"',
    "<password>@</password>",
    "http://host/?token=@&a=b",
    'os.getenv("SECRET", "@")',
    "secret => '@'",
    'config(master_key=b"@")',
    "Authorization: @",
    "Authorization: Token @",
    "AccountName=x;EndpointSuffix=core;SharedSecret=@",
]


def gone(text: str, secret: str, count: int = 1) -> str:
    """`secret` is gone from the text, which is what it was otherwise, and stays so."""
    redacted, found = redactor.redact(text)
    assert secret not in redacted, text
    assert found == count
    before, _, after = text.partition(secret)
    assert redacted.startswith(before[:-8])
    assert len(redacted) < len(before) + len(after) + 40
    assert redacted.endswith(after)
    assert redactor.redact(redacted) == (redacted, 0)
    return redacted


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("issuer", TOKENS)
def test_a_token_goes_wherever_it_stands(issuer: str, around: str) -> None:
    for make in TOKENS[issuer]:
        for seed in range(25):
            secret = make(Draw(seed))
            shown = json.dumps(secret)[1:-1] if around[0] in "[{" else secret
            redacted = gone(around.replace("@", shown), shown)
            if around[0] in "[{":
                json.loads(redacted)


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize(
    ("alphabet", "length"), [(ALNUM, 24), (ALNUM, 40), (HEX, 32), (BASE64, 44), (URLSAFE, 43), (LOWER + DIGITS, 32)]
)
def test_a_random_value_goes_where_its_name_tells_what_it_is(written: str, alphabet: str, length: int) -> None:
    for seed in range(25):
        secret = Draw(seed)(alphabet, length)
        gone(written.replace("@", secret), secret)


def test_how_many_random_values_are_taken_for_words() -> None:
    """A judgement, so it may miss a few: of the shortest that are looked at, and of the usual ones."""
    for alphabet, length, most in [(ALNUM, 16, 120), (HEX, 16, 120), (ALNUM, 24, 20), (ALNUM, 32, 2), (HEX, 32, 2)]:
        missed = sum(not looks_random(Draw(seed)(alphabet, length).encode()) for seed in range(1000))
        assert missed <= most, (alphabet, length, missed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Authorization: Bearer @", "Authorization: Bearer [redacted: bearer token]"),
        ('{"Authorization": "bearer @"}', '{"Authorization": "bearer [redacted: bearer token]"}'),
        ("curl -H 'authorization: BEARER @'", "curl -H 'authorization: BEARER [redacted: bearer token]'"),
        ("Proxy-Authorization: Token @", "Proxy-Authorization: Token [redacted: authorization header]"),
        ("my_secret = '@'", "my_secret = '[redacted: secret value]'"),
        ("AccountKey=@", "AccountKey=[redacted: secret value]"),
    ],
)
def test_what_is_put_in_its_place(text: str, expected: str) -> None:
    secret = Draw(1)(ALNUM, 20)
    assert redactor.redact(text.replace("@", secret))[0] == expected.replace("@", secret)


def test_basic_credentials() -> None:
    for pair in ("user:pass", "admin:p\u00e4ss wort"):
        code = base64.b64encode(pair.encode()).decode()
        assert redactor.redact(f"Authorization: Basic {code}") == (
            "Authorization: Basic [redacted: basic credentials]",
            1,
        )
    for text in ("Basic training", "basic authentication", "BASIC programming", "Basic " + "A" * 24):
        assert redactor.redact(text) == (text, 0)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://me:pw@host/db", "postgresql://me:[redacted: password in a URL]@host/db"),
        ("https://me:p@ss:w%20rd!@host:80/a@b", "https://me:[redacted: password in a URL]@host:80/a@b"),
        ("redis://:pw@10.0.0.1", "redis://:[redacted: password in a URL]@10.0.0.1"),
        (
            "'amqp://a:b@c', 'amqp://a:b@d'",
            "'amqp://a:[redacted: password in a URL]@c', 'amqp://a:[redacted: password in a URL]@d'",
        ),
        *(
            (url, url)
            for url in (
                "https://host:8080/path@1.2",
                "ssh://git@host:22/repo.git",
                "f'postgres://{user}:{password}@{host}'",
                "postgres://$USER:$PASSWORD@$HOST",
                "postgres://user:%s@host",
                "postgres://user:<password>@host",
                "postgres://user:***@host",
                "http://[::1]:80/@x",
            )
        ),
    ],
)
def test_passwords_in_urls(url: str, expected: str) -> None:
    redacted, _ = redactor.redact(url)
    assert redacted == expected
    assert redactor.redact(redacted) == (expected, 0)


def test_keys_of_azure_telegram_and_aws() -> None:
    draw = Draw(1)
    account = base64.b64encode(draw.data(64)).decode()
    text = gone(f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={account};EndpointSuffix=core", account)
    assert "AccountKey=[redacted: Azure key];" in text
    bot = "AA" + draw(URLSAFE, 33)
    assert gone(f"https://api.telegram.org/bot1234567890:{bot}/getMe", bot).count(
        "bot1234567890:[redacted: Telegram token]"
    )
    key, secret = "AKIA" + draw(UPPER, 16), draw(BASE64, 40)
    for between in (",", '", "', "\t", ": "):
        assert redactor.redact(f"1{between}{key}{between}{secret}\n") == (f"1{between}[redacted: AWS key]\n", 1)


def test_a_private_key_goes_even_where_its_end_was_cut_off() -> None:
    whole = pem(Draw(3))
    for cut in (80, 200, len(whole) - 5):
        redacted, count = redactor.redact("Look: " + whole[:cut])
        assert count == 1
        assert redacted.startswith("Look: [redacted: private key]")
        assert len(redacted) < 100
    for text in ("We look for -----BEGIN PRIVATE KEY----- in files.", "-----BEGIN CERTIFICATE-----\nMIIB\n"):
        assert redactor.redact(text) == (text, 0)
    public = pem(Draw(3), "PUBLIC KEY")
    assert redactor.redact(public) == (public, 0)


# What this process knows


def test_known_secrets_go_in_every_spelling() -> None:
    known = Redactor(['correct horse "battery"/stäple', "sk-short-key", "only7ch", ""])
    for text in (
        'pw: correct horse "battery"/stäple!',
        json.dumps(['correct horse "battery"/stäple']),
        json.dumps(['correct horse "battery"/stäple'], ensure_ascii=False),
        "postgres:me@h?p=correct%20horse%20%22battery%22%2Fst%C3%A4ple",
        "xsk-short-keyx",
    ):
        redacted, count = known.redact(text)
        assert count == 1
        assert mark("known secret") in redacted
        assert "horse" not in redacted
        assert known.redact(redacted) == (redacted, 0)
    assert known.redact("only7ch, Correct Horse") == ("only7ch, Correct Horse", 0)


def test_known_secrets_that_overlap_go_as_one() -> None:
    known = Redactor(["abcdefghij", "fghijklmnop", "abcdefgh"])
    assert known.redact("<abcdefghijklmnop>") == ("<[redacted: known secret]>", 1)
    # One begins in the name of another, before what goes of that.
    value = Draw(1)(ALNUM, 20)
    assert Redactor(["ord='" + value[:9]]).redact(f"password='{value}'") == ("passw[redacted: secret value]'", 1)
    key = "sk-proj-" + Draw(1)(ALNUM, 40)
    assert Redactor([key + "/more"]).redact(f"a {key}/more b") == ("a [redacted: known secret] b", 1)


def test_what_a_mark_says_is_not_looked_for() -> None:
    known = Redactor(["redacted: ", "known secret", "bearer token"])
    text = "the bearer token is a known secret"
    assert known.redact(text) == (text, 0)


def test_known_secrets_across_the_windows_of_the_search() -> None:
    known, secret = Redactor(["0123456789-known"]), "0123456789-known"
    for before in range((1 << 18) - 20, (1 << 18) + 4):
        assert known.redact("." * before + secret + ".") == ("." * before + mark("known secret") + ".", 1)


# What stays


def test_the_project_itself_stays_as_it_is() -> None:
    """Prose, code, JSON, YAML and 130 packages' digests; but for examples of passwords in URLs."""
    files = [
        path
        for pattern in ("*.md", "*.toml", "*.lock", "orchestrator/**/*.py", "policies/*", "tests/**/*.yaml", "deploy/*")
        for path in PROJECT.glob(pattern)
        if path.is_file()
    ]
    assert len(files) > 100
    for path in files:
        text = path.read_text()
        redacted, count = redactor.redact(text)
        assert redacted.count(mark("password in a URL")) == count == text.count("USER:PASSWORD@"), path


@given(st.integers(0, 2**32))
@settings(max_examples=200)
def test_digests_ids_and_images_stay_as_they_are(seed: int) -> None:
    draw = Draw(seed)
    image, digest = base64.b64encode(draw.data(3000)).decode(), draw(HEX, 64)
    for text in (
        f"data:image/png;base64,{image}",
        "\n".join(image[at : at + 76] for at in range(0, len(image), 76)),
        f"sha256:{digest} {draw(HEX, 40)} {draw(HEX, 32)}",
        f"{uuid.UUID(bytes=draw.data(16))}",
        json.dumps({"id": f"{uuid.UUID(bytes=draw.data(16))}", "hash": digest, "tokens": 12, "policy": digest}),
        json.dumps({"payloads": {"code": {"commitment": digest, "bytes": 6}}, "prev": digest, "tenant": "default"}),
    ):
        assert redactor.redact(text) == (text, 0)


@pytest.mark.parametrize(
    "text",
    [
        "The bearer of this letter is known; the secret: nobody reads it. Password: changeme",
        "token = getTokenFromBase64String(request)",
        "password = hash_password_v2(form['password'])",
        "api_key = os.environ['OPENAI_API_KEY_2']",
        "secret = config.database.primary_secret_1",
        "tokens = tokenizer.encode_plus2(text)",
        "from x import Ed25519PrivateKey, Ed25519PublicKey",
        "the risk-management-framework-for-2026, a task-based-pipeline-v2, sk-learn",
        "API_KEY=your-api-key-goes-here",
        "sk-...",
        "Authorization: Bearer $TOKEN",
        "Authorization: Bearer <your token here>",
        "input_tokens: 1234567890, max_tokens=4096",
        "https://example.com/token/2026-11-25T10:00:00Z",
        "secret: arn:aws:secretsmanager:us-east-1",
        "initial_value_of_the_thing, internal_representation_of_2026",
        "eyJhbGciOi.is.not.one",
        "budget-exhausted: this call could cost 0.0012 USD",
        "",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redactor.redact(text) == (text, 0)
    assert redactor.redact(text)[0] is text


# Properties

fragments = st.sampled_from(
    [
        *(make(Draw(seed)) for makes in TOKENS.values() for make in makes for seed in (1, 2)),
        *(anchor for form in FORMS for anchor in form.anchors),
        *(
            "Bearer ",
            "Basic ",
            "password=",
            "token: ",
            "AccountKey=",
            "://a:",
            "@b",
            ".",
            "-",
            "_",
            " ",
            '"',
            "\\n",
            "\n",
        ),
        *("-----END RSA PRIVATE KEY-----", "A" * 40, "x9" * 20, "12345678", "/", "=", "[", "]", "ß", "\ud800"),
        mark("known secret"),
    ]
)


@given(st.lists(fragments | st.text(max_size=5), max_size=12).map("".join))
@settings(max_examples=500)
def test_doing_it_again_changes_nothing(text: str) -> None:
    known = Redactor(["x9x9x9x9x9", "known-secret-1"])
    redacted, count = known.redact(text)
    assert (count == 0) == (redacted is text)
    assert known.redact(redacted) == (redacted, 0)


@given(st.text())
def test_text_without_an_anchor_is_handed_back(text: str) -> None:
    assert redactor.redact(text) == (text, 0)


# Time

EVIL = {
    **{f"anchor {anchor!r}": anchor for form in FORMS for anchor in form.anchors},
    **{f"{issuer} begun": TOKENS[issuer][0](Draw(1))[:-1] + "!" for issuer in TOKENS},
    "PEM begun": "-----BEGIN PRIVATE KEY-----",
    "PEM lines": "-----BEGIN PRIVATE KEY-----\n" + ("A" * 64 + "\n") * 20,
    "PEM dashes": "-----BEGIN PRIVATE KEY----- - -- ",
    "JWT begun": ".eyJ" + "a" * 60,
    "JWT parts": "eyJhbGciOiJIUzI1NiJ9.",
    "JWT deep": "." + "eyJ" + base64.b64encode(b"[" * 4000).decode() + ".a.b",
    "URL begun": "://a:b",
    "URL at": "://a:" + "b@" * 100,
    "named": "token=token",
    "named spaces": "token        =        ",
    "random": "token=a1b2c3d4e5f6g7h8i9j0(",
    "bearer": "bearer bearer-bearer-bearer ",
    "escaped": "\\nsk-",
    "case": "aBcDeFgH",
}


@pytest.mark.parametrize("piece", EVIL.values(), ids=EVIL.keys())
def test_time_grows_with_the_text_and_no_faster(piece: str) -> None:
    """Eight times the text, less than 24 times the work: what is quadratic takes 64 times as much."""
    known = Redactor(["abcdefgh", "abcdefghabcdefghi"])

    def seconds(size: int) -> float:
        text = (piece * (size // len(piece) + 1))[:size]
        best = 60.0
        for _ in range(2):
            started = time.thread_time()
            known.redact(text)
            best = min(best, time.thread_time() - started)
        return best

    small, large = seconds(1 << 16), seconds(1 << 19)
    assert large < 24 * max(small, 0.001), (small, large)
    assert large < 5
