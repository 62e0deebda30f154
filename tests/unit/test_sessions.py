"""A session's cookie: what was issued opens until it expires, and nothing else ever does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response

from orchestrator.server.sessions import LASTS_S, MOST_ENDED, Session, Sessions, set_cookie

KEY = "abcdefgh2345"
SESSIONS = Sessions(bytes(32))
VALUE = SESSIONS.issue(KEY, 1000.5)


def test_a_session_lasts_its_time():
    found = SESSIONS.open(VALUE, 1000)
    assert found
    assert found.key_id == KEY
    assert SESSIONS.open(VALUE, 999 + LASTS_S) == found
    assert SESSIONS.open(VALUE, 1000 + LASTS_S) is None
    assert Sessions(b"k" * 32).open(VALUE, 1000) is None, "another service's"


def test_a_session_that_was_ended_opens_no_more():
    sessions = Sessions(bytes(32))
    mine, other = sessions.issue(KEY, 0), sessions.issue(KEY, 0)
    session = sessions.open(mine, 1)
    assert session
    sessions.end(session, 1)
    assert sessions.open(mine, 1) is None
    assert sessions.open(other, 1)
    assert sessions.open(sessions.issue(KEY, 2), 2)


def test_no_crowd_makes_it_forget_what_was_ended():
    sessions = Sessions(bytes(32))
    end(sessions, stolen := sessions.issue(KEY, 0))
    other = sessions.issue("b" * 12, 0)
    for number in range(10 * MOST_ENDED):
        value = sessions.issue(KEY, number)
        end(sessions, value, number)
        assert sessions.open(stolen, number) is None
        assert sessions.open(value, number) is None
    assert sessions.open(other, 1), "another key's"
    assert sum(map(len, sessions._ended.values())) <= MOST_ENDED
    last = 10 * MOST_ENDED + LASTS_S
    end(sessions, sessions.issue(KEY, last), last)
    assert sum(map(len, sessions._ended.values())) == 1, "those that have expired are forgotten"


def end(sessions: Sessions, value: str, now: float = 0) -> None:
    session = sessions.open(value, now)
    assert session
    sessions.end(session, now)


def test_each_session_has_a_token_of_its_own():
    first, second = (SESSIONS.open(SESSIONS.issue(KEY, 0), 1) for _ in range(2))
    assert isinstance(first, Session)
    assert isinstance(second, Session)
    assert first.csrf != second.csrf
    assert first.csrf not in VALUE, "who sees the cookie alone has not the token"


@given(st.data())
def test_a_changed_cookie_opens_nothing(data: st.DataObject):
    at = data.draw(st.integers(0, len(VALUE) - 1))
    changed = VALUE[:at] + data.draw(st.characters()) + VALUE[at + 1 :]
    assert SESSIONS.open(changed, 1000) is None or changed == VALUE


@given(st.text())
def test_no_other_text_opens(text: str):
    for value in (text, f"{KEY}.{text}", VALUE + text, f"{KEY}.9999999999.{text}.{VALUE.split('.')[-1]}"):
        assert SESSIONS.open(value, 1000) is None or value == VALUE


@pytest.mark.parametrize(
    "value", ["", "...", "\0", "\ud800", "." * 10**6, "a.b.c.d", f"{KEY}.-1.x.y", f"{KEY}.1e9.x.y"]
)
def test_hostile_cookies(value: str):
    assert SESSIONS.open(value, 1000) is None


@pytest.mark.parametrize(
    ("secure", "value", "cookie"),
    [
        (True, "v", f"__Host-airlock=v; HttpOnly; Max-Age={LASTS_S}; Path=/; SameSite=strict; Secure"),
        (False, "v", f"airlock=v; HttpOnly; Max-Age={LASTS_S}; Path=/; SameSite=strict"),
        (True, "", '__Host-airlock=""; HttpOnly; Max-Age=0; Path=/; SameSite=strict; Secure'),
    ],
)
def test_the_cookie_is_for_this_host_and_no_script(secure: bool, value: str, cookie: str):
    response = Response()
    set_cookie(response, value, secure=secure)
    assert response.headers["set-cookie"] == cookie
