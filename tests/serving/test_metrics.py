"""What /metrics really says against what the dashboard and the alerts of `deploy/` ask for."""

import asyncio
import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest, multiprocess

from pipelines.settings import Settings
from serving import metrics, served
from serving.answers import Answers
from serving.collect import _aside, _events, _refused
from serving.fallbacks import Deadline

DEPLOY = Path(__file__).parents[2] / "deploy"
WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "offset", "and", "or", "unless", "bool", "le"}
NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def expressions():
    """Every expression of the dashboards and the alerts, by where it stands, with the labels that a text of it shows."""
    found = {}
    for path in sorted(DEPLOY.glob("grafana/*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                shown = re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"])
                found[f"{path.name}: {panel['title']} {target['refId']}"] = (target["expr"], shown)
    for path in sorted(DEPLOY.glob("prometheus/*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                shown = re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"]))
                found[f"{path.name}: {rule['alert']}"] = (rule["expr"], shown)
    return found


def asked(expression):
    """Metric -> the labels it is filtered by, and the labels that the whole is grouped by."""
    text = re.sub(r"\[[^\]]*\]|offset\s+\w+", " ", expression)
    grouped = {label for inner in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", text) for label in NAME.findall(inner)}
    text = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", " ", text)
    filtered = {}
    for name, matchers in re.findall(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}", text):
        filtered.setdefault(name, set()).update(re.findall(r"(\w+)\s*[=!]~?", re.sub(r'"[^"]*"', '""', matchers)))
    text = re.sub(r"\{[^}]*\}", " ", text)
    for match in NAME.finditer(text):
        is_function = text[match.end() :].lstrip().startswith("(")
        if not is_function and match.group() not in WORDS and not match.group().startswith("__"):
            filtered.setdefault(match.group(), set())
    return filtered, grouped


def told(text):
    """Metric -> its labels, as a scrape has them."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition("{")
            labels = set(re.findall(r'(\w+)="', rest)) if rest else set()
            found.setdefault(name.split(" ")[0], set()).update(labels)
    return found


@pytest.fixture(scope="module")
def scraped(shop, cast, rehearse):
    """The names at /metrics of a core that answered, as BentoML puts them together; what takes a failure to happen is counted by hand."""
    core, keys = Answers(Settings(home=shop), rehearse=rehearse), json.dumps({"customer_ids": [cast.customers[1], "nobody"]})
    core.open()
    asyncio.run(core.recommend_body(b'{"customer_id": "nobody"}', Deadline.after_ms(5_000)))
    asyncio.run(core.score_body("churn")(keys.encode(), Deadline.after_ms(5_000)))
    core.close()
    metrics.request("/churn", "200").observe(0.001)
    for series in (
        metrics.shed("docs"), metrics.rate_limited("decide"), metrics.model_refused("churn"), metrics.shadow("churn", "scored"),
        metrics.ranking(is_remembered=True),
        metrics.traces("exported"),
        _events("shop", "new"), _refused("shop", "size"), _aside("shop", "type"), served.dropped(),
    ):  # fmt: skip
        series.inc(0)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return told(generate_latest(registry).decode())


@pytest.mark.parametrize("where", expressions())
def test_dashboard_and_alerts_ask_for_what_there_is(scraped, where):
    expression, shown = expressions()[where]
    filtered, grouped = asked(expression)
    assert filtered
    for name, labels in filtered.items():
        assert name in scraped, f"{name} is not at /metrics"
        assert labels <= scraped[name]
        assert grouped <= scraped[name]
    assert set(shown) <= grouped


def test_every_family_is_at_metrics_and_on_the_dashboard(scraped):
    text = " ".join(expression for expression, _ in expressions().values())
    for name, family in metrics.FAMILIES.items():
        own = {"counter": f"{name}_total", "gauge": name, "histogram": f"{name}_bucket"}[family.kind]
        assert set(family.labels) <= scraped[own]
        assert name in text


@pytest.mark.parametrize(
    ("expression", "metric", "labels", "grouped"),
    [
        ('sum by (le, a) (rate(m_bucket{code=~"5..", x!="y=z"}[5m])) > 0.1', "m_bucket", {"code", "x"}, {"le", "a"}),
        ("histogram_quantile(0.9, rate(m[1m] offset 1d))", "m", set(), set()),
    ],
    ids=["filtered", "bare"],
)
def test_expressions_are_read_right(expression, metric, labels, grouped):
    assert asked(expression) == ({metric: labels}, grouped)


def test_latencies_are_told_from_half_a_millisecond_to_two_seconds():
    assert {0.0005, 2.0} <= set(metrics.SECONDS)
    assert list(metrics.SECONDS) == sorted(metrics.SECONDS)


@settings(max_examples=50)
@given(st.lists(st.sampled_from([*metrics.SCORES, 0.0, 0.07, 0.95001, 2.0]), max_size=20))
def test_what_a_round_of_the_loop_observed_is_what_one_by_one_would_have_been(values):
    async def observe():
        for value in values:
            metrics.score("in a round").observe(value)
        await asyncio.sleep(0)

    before = [seen("in a round"), seen("one by one")]
    asyncio.run(observe())
    for value in values:  # there is no loop here
        metrics.score("one by one").observe(value)
    after = [seen("in a round"), seen("one by one")]
    in_a_round, one_by_one = ([b - a for a, b in zip(*pair, strict=True)] for pair in zip(before, after, strict=True))
    assert in_a_round == pytest.approx(one_by_one)
    assert in_a_round[-2] == len(values)


def test_observations_of_a_loop_that_ended_too_soon_come_with_the_next():
    before = seen("of two loops")[-2]
    lost = asyncio.new_event_loop()

    async def observe():
        metrics.score("of two loops").observe(0.5)

    lost.call_soon(lambda: (metrics.score("of two loops").observe(0.5), lost.stop()))
    lost.run_forever()
    lost.close()
    asyncio.run(observe())
    assert seen("of two loops")[-2] == before + 2


def seen(model):
    """Of the probabilities of a model: each bucket, the number of all, their sum."""
    from prometheus_client import REGISTRY

    buckets = [("rapport_score_bucket", {"le": str(bound)}) for bound in (*metrics.SCORES, "+Inf")]
    samples = [*buckets, ("rapport_score_count", {}), ("rapport_score_sum", {})]
    return [REGISTRY.get_sample_value(name, {"model": model, **labels}) or 0.0 for name, labels in samples]
