"""The console through the gateway: who gets in, what is shown, and that nothing shown becomes markup."""

import asyncio
import contextlib
import json
import re
import subprocess
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from pipelines.settings import Settings
from serving import access
from serving.console.desk import Console
from serving.console.markup import Html, element, page
from serving.console.sessions import MINUTES, Sessions
from serving.gateway import Answer, Gateway, Refused
from serving.wire import Item, Prediction, Reason, Recommendation, Scores

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
ATTACK = "</title><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">'\"&"
FOUND = {
    "customer_id": "c0123456789abcdef",
    "identifiers": [{"kind": "email", "value": "a***@example.com"}, {"kind": "anonymous_id", "value": None}],
    "consent": {"personalization": {"is_allowed": True, "source": "web", "event_timestamp": "2026-02-01 08:00:00+00:00"},
                "marketing": {"is_allowed": False, "source": None, "event_timestamp": None}},
    "traits": {"city": {"value": ATTACK, "source": ATTACK}},
    "links": {"path": [{}, {}]},
    "segment": {"segment": "loyal browsers", "lifecycle": "frequent", "rfm_tier": "high"},
    "timeline": [{"event_timestamp": "2026-02-28 20:15:00+00:00", "type": "purchase", "item_id": ATTACK, "revenue_cents": 123_456},
                 {"event_timestamp": "2026-02-27 10:00:00+00:00", "type": "cart_add", "item_id": "item-2"}],
    "features": {"views_7d": 1_234, "views_total": 5_678, "last_event_at": 1_772_366_400_000_000, "region": None},
    "features_age_s": 7_200.0,
    "as_of": NOW.isoformat(),
}  # fmt: skip


class People:
    """Knows ann alone."""

    def __init__(self):
        self.asked = []

    async def answer(self, path, method, name, query):
        self.asked.append((path, method, name, query))
        if name != "ann":
            raise Refused(404, "not_found", "nobody is known under this name")
        return Answer(200, json.dumps(FOUND).encode())


class Core:
    """One score with a reason, one recommendation."""

    async def score(self, task, request, deadline):
        told = Prediction(request.customer_ids[0], 0.87654, "high", "personal", [Reason("silence", 3.5, 1.25), Reason("pace", None, -0.5)])
        return Scores([told], "3", "personal", False, [], NOW, 60.0)

    async def recommend(self, request, deadline):
        return Recommendation(
            "d", request.customer_id, [Item(ATTACK, 2.5, 1, "because you viewed it")], "4", "popular", True, ["consent"], NOW
        )


@pytest.fixture
def shop(tmp_path):
    """`ask(method, path, ...)`, the keys' settings, and the people behind."""
    settings = Settings(home=tmp_path, admin_key=SecretStr("admin"), decide_key=SecretStr("decide"), collect_key=SecretStr("collect"))
    found = SimpleNamespace(settings=settings, people=People(), keys=access.load_keys(settings), now=1_000_000.0)
    sessions = Sessions(lambda: "secret", is_tls=False, now_s=lambda: found.now)
    gateway = Gateway(
        None, handlers={}, pages={}, door=None, people=found.people, keys=lambda: found.keys, is_loopback_only=True,
        max_body_bytes=1_000, deadline_ms=100, console=Console(found.people, Core(), tasks=lambda: ["churn"], sessions=sessions),
    )  # fmt: skip

    async def ask(method, path, headers, options):
        transport = httpx.ASGITransport(gateway, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as http:
            return await http.request(method, path, headers=headers, **options)

    found.ask = lambda method, path, headers=None, **options: asyncio.run(ask(method, path, headers or {}, options))
    return found


@pytest.fixture
def session(shop):
    """The headers of somebody who signed in."""
    answer = shop.ask("POST", access.SIGN_IN, data={"key": "admin"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/console")
    return {"Cookie": answer.headers["set-cookie"].partition(";")[0]}


def text_of(answer):
    return re.sub(r"<[^>]*>", " ", answer.text)


# -- who gets in


@pytest.mark.parametrize("key", ["", "decide", "collect", "Admin", "admin\0", "x" * 3_000])
def test_other_keys_do_not_sign_in(shop, key):
    answer = shop.ask("POST", access.SIGN_IN, data={"key": key})
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert "not a valid admin key" in answer.text


def test_without_a_session_nobody_is_looked_for(shop):
    assert "Admin key" in shop.ask("GET", access.CONSOLE).text
    for headers in ({}, {"Cookie": "rapport_console=9999999999.00"}, {"Authorization": "Bearer decide"}):
        answer = shop.ask("POST", access.CUSTOMER, headers, data={"name": "ann"})
        assert answer.status_code == 401
        assert FOUND["customer_id"] not in answer.text
    assert not shop.people.asked


def test_cookie_holds_no_key_and_is_kept_from_scripts_and_other_sites(shop):
    cookie = shop.ask("POST", access.SIGN_IN, data={"key": "admin"}).headers["set-cookie"]
    assert "admin" not in cookie
    assert {"HttpOnly", "SameSite=Strict", "Path=/console"} <= set(cookie.split("; "))
    assert "Secure" in Sessions(lambda: "s", is_tls=True).cookie(b"d").decode()


def test_session_ends_with_its_time_and_is_renewed_by_use(shop, session):
    shop.now += MINUTES * 60 - 1
    used = shop.ask("GET", access.CONSOLE, session)
    assert "Find a customer" in used.text
    shop.now += 2
    assert "Admin key" in shop.ask("GET", access.CONSOLE, session).text
    assert "Find a customer" in shop.ask("GET", access.CONSOLE, {"Cookie": used.headers["set-cookie"].partition(";")[0]}).text


def test_session_ends_with_its_key(shop, session):
    shop.keys = access.Keys(tuple((role, digest) for role, digest in shop.keys.digests if role is not access.Role.ADMIN))
    assert "Admin key" in shop.ask("GET", access.CONSOLE, session).text


def test_session_ends_by_signing_out(shop, session):
    answer = shop.ask("POST", access.SIGN_OUT, session)
    assert answer.status_code == 303
    assert "rapport_console=; " in answer.headers["set-cookie"]


@given(st.binary(max_size=90))
def test_no_other_cookie_is_a_session(value):
    sessions = Sessions(lambda: "secret", is_tls=False, now_s=lambda: 0.0)
    assert sessions.digest_of(b"rapport_console=" + value, [b"digest"]) is None


def test_form_of_another_site_is_refused(shop, session):
    for site in ("cross-site", "same-site"):
        answer = shop.ask("POST", access.CUSTOMER, session | {"Sec-Fetch-Site": site}, data={"name": "ann"})
        assert answer.status_code == 403
    assert shop.ask("GET", access.CONSOLE, {"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link may lead here


# -- what is shown


def test_page_shows_everything_that_is_known(shop, session):
    answer = shop.ask("POST", access.CUSTOMER, session, data={"name": " ann "})
    assert answer.status_code == 200
    shown = text_of(answer)
    for said in ("c0123456789abcdef", "a***@example.com", "kept as a pseudonym", "loyal browsers", "frequent", "high value", "87.7%",
                 "+1.250",
                 "because you viewed it", "degraded", "(consent)", "personalization", "refused", "cart add", "1,234.56", "2026-02-28 20:15",
                 "1,234", "5,678", "newest change 2 h ago", "2 links"):  # fmt: skip
        assert said in shown, said
    assert shop.people.asked == [(access.PROFILE, "GET", "ann", b"")]


def test_unknown_customer_is_said_to_be_unknown(shop, session):
    answer = shop.ask("POST", access.CUSTOMER, session, data={"name": f"bob{ATTACK}"})
    assert answer.status_code == 404
    assert "Nobody is known under this name." in answer.text
    assert "<script" not in answer.text


@pytest.mark.parametrize("form", [{}, {"name": ""}, {"name": " "}, {"name": "x" * 257}, {"other": "ann"}])
def test_search_without_a_usable_name_is_400(shop, session, form):
    assert shop.ask("POST", access.CUSTOMER, session, data=form).status_code == 400
    assert not shop.people.asked


def test_form_that_is_none_is_refused(shop, session):
    assert shop.ask("POST", access.CUSTOMER, session, content=b"\xff\xfe").status_code == 400
    assert shop.ask("POST", access.CUSTOMER, session, content=b"&".join([b"a=b"] * 50)).status_code == 400
    assert shop.ask("POST", access.CUSTOMER, session, content=b"name=" + b"x" * 5_000).status_code == 413


def test_name_in_an_address_is_not_looked_at(shop, session):
    answer = shop.ask("GET", f"{access.CUSTOMER}?name=ann", session)
    assert (answer.status_code, answer.headers["location"]) == (303, "/console")
    assert not shop.people.asked


def test_pages_may_load_their_style_and_nothing_else(shop, session):
    pages = [shop.ask("GET", access.CONSOLE), shop.ask("POST", access.CUSTOMER, session, data={"name": "ann"})]
    for answer in pages:
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; style-src 'self'; ")
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
        assert (answer.headers["x-frame-options"], answer.headers["referrer-policy"]) == ("DENY", "no-referrer")
        assert not re.search(r"<(script|img|iframe)|<[^>]*\s(on\w+|style)=|https?://", answer.text)
    style = shop.ask("GET", access.STYLE)
    assert style.headers["content-type"].startswith("text/css")
    assert "url(" not in style.text
    assert "@import" not in style.text


def test_page_can_be_used_by_keyboard_and_screen_reader(shop, session):
    shown = shop.ask("POST", access.CUSTOMER, session, data={"name": "ann"}).text
    assert '<html lang="en">' in shown
    assert shown.count("<h1>") == 1
    assert 'href="#content"' in shown
    assert 'id="content"' in shown
    for field in re.findall(r'<input id="(\w+)"', shown):
        assert f'<label for="{field}"' in shown
    assert 'tabindex="0"' in shown  # what scrolls
    assert "<meter" in shown


@given(st.text(), st.text())
def test_text_stays_text(child, value):
    made = element("p", child, title=value)
    assert len(re.findall(r"[<>]", made)) == 4
    assert made.count('"') == 2
    assert isinstance(made, Html)
    page(made)  # whatever it is, it can be sent


def test_markup_is_escaped_unless_it_was_made_here():
    assert element("b", "<i>", element("i", 1), None) == "<b>&lt;i&gt;<i>1</i></b>"


# -- in a browser


def test_browser_shows_what_was_sent_as_text_and_runs_none_of_it(shop, session, browser, tmp_path):
    requested = []

    class Shown(BaseHTTPRequestHandler):
        """The address / is the customer's page; other addresses are the gateway's."""

        def do_GET(self):
            requested.append(self.path)
            answer = shop.ask("POST", access.CUSTOMER, session, data={"name": "ann"}) if self.path == "/" else shop.ask("GET", self.path)
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Shown)
    with contextlib.closing(server.socket):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            *browser,
            "--virtual-time-budget=2000",
            f"--screenshot={tmp_path}/page.png",
            "--dump-dom",
            f"http://127.0.0.1:{server.server_port}/",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        server.shutdown()
    assert "<title>Customer c0123456789abcdef – Rapport</title>" in done.stdout  # else its script had run
    assert "&lt;script&gt;document.title='taken'&lt;/script&gt;" in done.stdout
    assert not re.search("<script|<img", done.stdout)
    assert set(requested) <= {"/", access.STYLE, "/favicon.ico"}
    assert access.STYLE in requested
    assert "Refused to" not in done.stderr
    assert (tmp_path / "page.png").stat().st_size > 10_000
