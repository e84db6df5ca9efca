"""The reads of the online store are measured beside Feast's, once both are found equal."""

import pytest

from pipelines import bench
from pipelines.settings import OnlineSettings, Settings
from serving import online_store, reading, redis_source

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_reads_are_measured_beside_feasts(tmp_path, redis_server, kind, monkeypatch):
    url = redis_server.url.rsplit("/", 1)[0] + "/10" if kind == "redis" else None
    settings = Settings(home=tmp_path, online=OnlineSettings(redis_url=url))
    bench.fill_for_reads(settings, customers=100)
    for patience in ("SILENCE_S", "CONNECT_S"):  # a machine that stands still for a moment is no server that is silent
        monkeypatch.setattr(redis_source, patience, 60.0)
    rows = reading.measure_reads(tmp_path, at=bench.AS_OF, n=20, items=10, redis_url=settings.online.redis_url)
    assert [row["name"].rpartition(": ")[2] for row in rows] == ["p50", "p99"] * 2
    for row in rows:
        assert row["rival"] == "get_online_features"
        assert row["ratio"] == pytest.approx(row["value"] / row["rival_value"])
    monkeypatch.setattr(online_store, "decode_value", lambda data: 7)
    with pytest.raises(RuntimeError, match="read through Feast"):
        reading.measure_reads(tmp_path, at=bench.AS_OF, n=20, items=10, redis_url=settings.online.redis_url)
