"""The bench of the service: rivals say what we say, a run in which requests failed is refused, figures are what was sent."""

import asyncio
import contextlib
import importlib.util
import json
import sys
import threading
import time
from http.client import HTTPConnection, RemoteDisconnected
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest

from serving.bench import rivals, search, serve, trouble
from serving.bench.relay import FROZEN, SLOW, TROUBLES, Relay
from serving.bench.sending import Plan, Second, offer, percentile, send
from serving.bench.serve import Cost
from serving.bench.trouble import Load
from serving.fallbacks import Deadline
from serving.process import ServiceError
from serving.wire import ScoreRequest


@pytest.mark.slow
def test_rivals_say_what_we_say(answers, settings, cast, tmp_path):
    """Without their servers: what those would answer, from the files that they are given."""
    import mlflow

    ids = cast.customers[:8]
    ours = answers.scoring.answer("churn", ScoreRequest(customer_ids=ids, reasons=0), Deadline.after_ms(5_000))
    assert ours.source == "personal"
    expected = np.array([prediction.probability for prediction in ours.predictions])

    rivals.write_plain(settings.home, tmp_path / "plain", at=cast.now.isoformat())
    spec = importlib.util.spec_from_file_location("plain_rival", tmp_path / "plain" / "service.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain = module.Plain.inner()
    told = plain.churn(customer_ids=ids)["predictions"]
    np.testing.assert_allclose([one["probability"] for one in told], expected, rtol=1e-9)
    items = plain.recommend(customer_id=cast.customers[0], k=5)["items"]
    assert {item["item_id"] for item in items} <= set(cast.items)
    assert len(items) == 5

    rivals.write_mlflow(settings.home, tmp_path / "mlflow")
    asked = [json.loads(text)["dataframe_split"] for text in serve.features(settings, ids)]
    frame = pd.DataFrame([one["data"][0] for one in asked], columns=asked[0]["columns"], dtype=float)
    raw = mlflow.pyfunc.load_model(str(tmp_path / "mlflow")).predict(frame)
    slope, intercept = answers.champions.bundle.scorers["churn"].learner.calibration_
    np.testing.assert_allclose(1 / (1 + np.exp(-(slope * np.log(raw / (1 - raw)) + intercept))), expected, rtol=1e-9)


class Scripted(BaseHTTPRequestHandler):
    """Answers what the server was told to."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        status, body = self.server.script
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def scripted():
    """A server that answers `server.script`: a status and a body."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        server.script = 200, b'{"model_version":"3","source":"stale","degraded":true}'
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def plan(server, **given):
    return Plan("127.0.0.1", server.server_address[1], "/churn", {"Content-Type": "application/json"}, ["{}"], 3.0, warm_up_s=0.1, **given)


def test_what_was_sent_is_told_by_the_second_and_by_what_the_answers_say(scripted):
    sent = asyncio.run(send(plan(scripted, connections=2, rate=40.0)))
    whole = sent.part()
    assert whole.ok == whole.degraded == len(whole.took_ms)
    assert 0 < whole.ok <= 121  # a rate, not as many as there can be
    assert set(sent.versions) == {'"3"'}
    assert set(sent.statuses) == {"200"}
    assert percentile(whole.took_ms, 0.99) >= percentile(whole.took_ms, 0.5) > 0
    scripted.script = 503, b"{}"
    refused = asyncio.run(send(plan(scripted, connections=2)))
    assert refused.failed == refused.answered > 0
    assert refused.part() == Second()  # a refusal has no time


def test_a_run_in_which_requests_failed_is_refused(scripted):
    scripted.script = 503, b"{}"
    with pytest.raises(ServiceError, match="expected to answer 200 always"):
        offer(plan(scripted, connections=2))


def test_rows_hold_each_figure_beside_its_rivals():
    names = ("ours: churn, no reasons", "ours: churn", "ours: intent, no reasons", "ours: recommend")
    costs = {name: Cost(200.0, 1_000.0, 1.0, 2.0) for name in names}
    costs |= {name: Cost(4_000.0, 50.0, 10.0, 20.0) for name in ("plain: churn", "plain: recommend", "mlflow")}
    rows = serve.cost_rows(costs | {"ceiling": Cost(50.0, 4_000.0, 0.5, 1.0)})
    assert {tuple(row) for row in rows} == {("name", "value", "unit", "rival", "rival_value", "ratio")}
    found = {(row["name"], row["rival"]): row["ratio"] for row in rows}
    assert found["/churn, one customer, no reasons: CPU", "mlflow models serve"] == 0.05
    assert found["/churn, one customer, no reasons: CPU", "the front alone"] == 4
    assert found["/recommend, 10 of all items: CPU", "the goal"] == pytest.approx(200 / serve.RECOMMEND_GOAL_US, abs=1e-4)


def test_overload_is_told_of_the_middle_turn_beside_the_most_of_before_and_after_it():
    """A machine that is half as fast for a while is no better and no worse at it."""

    def load(in_time, *, refused=0.0, cpu_s=1.0, other=0):
        return Load(in_time, 0.25, in_time, refused, in_time + refused, cpu_s, 200.0, 0.3, other)

    peaks = [load(1_000.0), load(1_000.0), load(500.0), load(500.0)]
    busy = [load(800.0, refused=10_000.0), load(300.0, other=2), load(450.0, refused=5_000.0, other=1)]
    rows = {row["name"].removeprefix("10 times the load: "): row for row in trouble.turns_told(peaks, busy, 250.0)}
    shares = {name: rows[name]["ratio"] for name in ("answered within the deadline", "the same in the worst of 3 turns")}
    assert shares == {"answered within the deadline": 0.8, "the same in the worst of 3 turns": 0.4}
    assert rows["answered within the deadline"]["rival_value"] == 1_000.0
    assert rows["answers marked degraded"]["value"] == 0.25
    assert rows["answered within the deadline, by the server's CPU"]["ratio"] == 0.8
    assert rows["answered otherwise"]["value"] == 3  # of all turns: it should be none


def test_the_relay_passes_on_and_makes_each_trouble(scripted):
    """Asked over HTTP, which is nothing to it."""
    with Relay(f"redis://who:secret@127.0.0.1:{scripted.server_address[1]}/3") as relay:
        assert relay.url == f"redis://who:secret@127.0.0.1:{urlsplit(relay.url).port}/3"  # where a Redis asks for it
        assert through(relay) == 200
        for trouble in TROUBLES:
            relay.trouble = trouble
            expected, timeout_s = ("late", 0.3) if trouble in (FROZEN, SLOW) else ("cut", 60.0)
            assert comes(expected, lambda timeout_s=timeout_s: through(relay, timeout_s=timeout_s)), trouble
        relay.trouble = None
        assert comes(200, lambda: through(relay))


def through(relay, *, timeout_s=60.0):
    """The status of the answer; "late" or "cut" where there is none."""
    with contextlib.closing(HTTPConnection("127.0.0.1", urlsplit(relay.url).port, timeout=timeout_s)) as connection:
        try:
            connection.request("POST", "/", body=b"{}")
            return connection.getresponse().status
        except TimeoutError:
            return "late"
        except (ConnectionError, RemoteDisconnected):
            return "cut"


def comes(expected, ask):
    """Whether that is the answer before long: the relay looks every 20 ms at what it is to do."""
    end = time.monotonic() + 60
    while (answer := ask()) != expected and time.monotonic() < end:
        pass
    return answer == expected


def test_the_search_is_told_beside_the_product_with_all_and_both_must_agree(shop, monkeypatch):
    (told,) = search.search_rows(shop)
    assert told["name"].startswith("30 best of 30 items x 8 factors")
    assert told["value"] > 0 < told["rival_value"]
    monkeypatch.setattr(search.InnerProducts, "best", lambda self, query, k: (np.arange(k), np.zeros(k, np.float32)))
    with pytest.raises(ServiceError, match="does not find"):
        search.search_rows(shop)
