"""The official clients, unchanged, and a real browser, against the real service: what they sent is what the log holds."""

import http.server
import json
import shutil
import subprocess
import threading
import time
import urllib.request
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from pipelines.log import open_log
from pipelines.settings import Settings
from serving.access import Role, read_key
from serving.process import start

pytestmark = pytest.mark.slow

OURS = ("receivedAt", "timestamp", "originalTimestamp")  # what a receipt adds to an event, or corrects
KINDS = {"track", "identify", "page", "screen", "group", "alias"}
NODE = """
const { Analytics } = require('@segment/analytics-node')
const [host, writeKey] = process.argv.slice(2)
const analytics = new Analytics({ host, writeKey, flushAt: 4, flushInterval: 200, maxRetries: 0 })
const sent = []
analytics.on('error', (error) => { console.error(error); process.exitCode = 1 })
const note = (error, ctx) => { if (error) { console.error(error); process.exitCode = 1 } else sent.push(ctx.event) }
const who = { userId: 'ünï \\u{1F6D2}', anonymousId: 'a1' }
const timestamp = new Date(Date.now() - 3600000)
analytics.identify({ ...who, traits: { email: 'eve@example.com', plan: null, tags: ['a', { b: 1.5 }] }, timestamp }, note)
analytics.track({ ...who, event: 'Order Completed', properties: { total: 12.99, products: [{ product_id: 'i1', price: 0.1 }] } }, note)
const context = { consent: { categoryPreferences: { ads: false } } }
analytics.track({ anonymousId: 'a1', event: 'Product Viewed', messageId: 'mine', context }, note)
analytics.page({ ...who, name: 'Home', category: 'Shop', properties: { url: 'https://shop.example/?q=ü' } }, note)
analytics.screen({ ...who, name: 'Start' }, note)
analytics.group({ ...who, groupId: 'g1', traits: { name: 'Acme' }, integrations: { All: false } }, note)
analytics.alias({ previousId: 'a1', userId: who.userId }, note)
analytics.closeAndFlush({ timeout: 10000 }).then(() => console.log(JSON.stringify(sent)))
"""
PAGE = """<!doctype html><title>waiting</title><script>
const host = "%s", writeKey = "%s", origin = "%s"
const call = (event) => ({ type: "track", event, anonymousId: origin, messageId: origin + event, writeKey })
const image = (address) => new Promise((done) => {
    const i = new Image()
    i.onload = () => done("loaded")
    i.onerror = () => done("failed")
    i.src = address
})
const script = (body) => fetch(host + "/v1/t", { method: "post", keepalive: true, body: JSON.stringify(body),
    headers: { "Content-Type": "text/plain", "Authorization": "Basic " + btoa(writeKey + ":"), "X-Retry-Count": "1" } })
    .then((answer) => answer.text(), () => "refused")
const send = async () => {
    const beacon = navigator.sendBeacon(host + "/v1/track", JSON.stringify(call("beacon")))
    const data = btoa(JSON.stringify(call("pixel"))).replace(/\\+/g, "-").replace(/\\//g, "_").replace(/=+$/, "")
    const pixel = await image(host + "/v1/pixel.gif?data=" + data)
    const fetched = await script(call("fetch"))
    document.body.textContent = JSON.stringify({ beacon, pixel, fetched, cookie: document.cookie })
}
addEventListener("load", send)
</script><body></body>"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """The real service with two workers, and pages of two origins, of which it knows one."""
    with pages() as known, pages() as unknown:
        settings = Settings(home=tmp_path_factory.mktemp("home"), collect={"origins": [known.origin]}, serving={"workers": 2})
        with start(settings, 0, is_alone=True) as service:
            key = read_key(settings, Role.COLLECT)
            yield SimpleNamespace(service=service, url=service.url, key=key, settings=settings, known=known, unknown=unknown)


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """A folder with the official Node client in it."""
    if not shutil.which("npm"):
        pytest.skip("npm is not on this machine")
    folder = tmp_path_factory.mktemp("node")
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "@segment/analytics-node@3"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"npm could not fetch the client: {done.stderr.strip()[-200:]}")
    return folder


@contextmanager
def pages():
    """A web server for one page, `page.html`, whose content is its attribute."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = server.page.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        server.page, server.origin = "", f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def kept(shop, group):
    """What came since the last look under this name, by message id."""
    with closing(open_log(shop.settings.home, settings=shop.settings)) as log:
        found = log.read(group, max_events=10_000)
        log.commit(group, [event.position for event in found])
        assert not log.parked(10)
    events = [json.loads(event.payload) for event in found]
    assert len({event["messageId"] for event in events}) == len(events)
    return {event["messageId"]: event for event in events}


def assert_same(sent, held, *, ours=OURS):
    """Every event is there, as it was sent; beyond that only what a receipt adds."""
    assert {event["messageId"] for event in sent} == set(held)
    for event in sent:
        mine = held[event["messageId"]]
        assert {name: value for name, value in mine.items() if name not in ours} == {
            name: value for name, value in event.items() if name not in ours and value is not None
        }
        assert mine["originalTimestamp"] == event["timestamp"]
        skew = datetime.fromisoformat(mine["timestamp"]) - datetime.fromisoformat(event["timestamp"])
        assert abs(skew.total_seconds()) < 60  # one clock, and they say an hour ago: what is corrected is the way here


@pytest.mark.parametrize(("packs", "waits"), [(False, False), (True, False), (True, True)])
def test_python_client_s_events_are_in_the_log_as_it_sent_them(shop, packs, waits):
    from segment.analytics.client import Client

    kept(shop, "python")
    failed = []
    client = Client(shop.key, host=shop.url + "/", gzip=packs, sync_mode=waits, on_error=lambda *error: failed.append(error), max_retries=0)
    who = {"user_id": "ünï \U0001f6d2", "anonymous_id": "a1"}
    then = datetime.now(UTC) - timedelta(hours=1)
    results = [
        client.identify("u1", {"email": "eve@example.com", "plan": None, "tags": ["a", {"b": 1.5}]}, timestamp=then),
        client.track(**who, event="Order Completed", properties={"total": 12.99, "when": then, "products": [{"product_id": "i1"}]}),
        client.track(anonymous_id="a1", event="Product Viewed", message_id=f"mine {packs} {waits}", integrations={"All": False}),
        client.page(**who, category="Shop", name="Home", properties={"url": "https://shop.example/?q=ü"}),
        client.screen(**who, name="Start", context={"consent": {"categoryPreferences": {"ads": False}}}),
        client.group(17, "g1", {"name": "Acme"}),
        client.alias("a1", "u1"),
        *[client.track("u2", f"Many {n}") for n in range(150 if not waits else 2)],
    ]
    if not waits:
        client.flush()
        client.join()
    assert not failed
    assert all(is_taken for is_taken, _ in results)
    sent = [json.loads(json.dumps(event, default=str)) for _, event in results]
    held = kept(shop, "python")
    assert {event["type"] for event in held.values()} == KINDS
    assert_same([without_times(event) for event in sent], {name: without_times(event) for name, event in held.items()})


def without_times(event):
    """`when` among the properties is text to the client's encoder, and to ours another."""
    properties = {name: value for name, value in event.get("properties", {}).items() if name != "when"}
    return event | ({"properties": properties} if "properties" in event else {})


def test_node_client_s_events_are_in_the_log_as_it_sent_them(shop, node):
    kept(shop, "node")
    (node / "send.js").write_text(NODE)
    done = subprocess.run(["node", "send.js", shop.url, shop.key], cwd=node, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    sent = json.loads(done.stdout)
    held = kept(shop, "node")
    assert {event["type"] for event in held.values()} == KINDS
    assert "mine" in held
    assert_same(sent, held)


def test_browser_sends_from_the_page_of_a_known_origin_and_its_script_from_no_other(shop, browser):
    kept(shop, "browser")
    said = {}
    for origin in (shop.known, shop.unknown):
        origin.page = PAGE % (shop.url, shop.key, origin.origin)
        command = [*browser, "--virtual-time-budget=4000", "--dump-dom", f"{origin.origin}/page.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        said[origin] = json.loads(done.stdout.partition("<body>")[2].partition("</body>")[0])
    assert said[shop.known] == {"beacon": True, "pixel": "loaded", "fetched": '{"success": true}', "cookie": ""}
    assert said[shop.unknown]["fetched"] == "refused"  # a beacon and an image need no leave, as with any site
    held, end = kept(shop, "browser"), time.monotonic() + 60
    while shop.known.origin + "beacon" not in held and time.monotonic() < end:  # it is sent when the browser finds the time
        held |= kept(shop, "browser")
        time.sleep(0.05)
    assert {name for name in held if name.startswith(shop.known.origin)} == {
        shop.known.origin + how for how in ("beacon", "pixel", "fetch")
    }
    assert shop.unknown.origin + "fetch" not in held


def test_counts_of_all_workers_are_those_of_the_log(shop):
    asked = urllib.request.Request(
        f"{shop.url}/v1/batch", b'{"batch": [{"type": "page", "userId": "u"}, {}, {"type": "page", "userId": "v"}]}'
    )
    asked.add_header("Authorization", f"Bearer {shop.key}")
    for _ in range(20):  # connections of their own: either worker takes some
        with urllib.request.urlopen(asked, timeout=10) as answer:
            assert answer.read() == b'{"success": true}'
    with urllib.request.urlopen(f"{shop.url}/metrics", timeout=10) as answer:
        told = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line.startswith("rapport_collect"))
    with closing(open_log(shop.settings.home, settings=shop.settings)) as log:
        counts = log.counts()
    assert float(told['rapport_collect_events_total{outcome="appended",source="segment"}']) == counts.appended
    assert float(told['rapport_collect_set_aside_total{reason="type_unknown",source="segment"}']) == counts.parked == 1
    assert float(told['rapport_collect_events_total{outcome="duplicate",source="segment"}']) == counts.duplicate == 19
    with urllib.request.urlopen(f"{shop.url}/docs.json", timeout=10) as answer:
        assert {"/v1/track", "/v1/batch", "/v1/pixel.gif", "/recommend"} <= set(json.load(answer)["paths"])
