"""Which store is opened, by what the settings name."""

import subprocess
import sys
from contextlib import closing

from pipelines.online.opening import open_stream_writer, open_writer
from pipelines.online.outbox import MirroredWriter
from pipelines.online.redis_writer import RedisWriter
from pipelines.online.writer import OnlineWriter
from pipelines.settings import OnlineSettings, Settings


def test_without_a_redis_it_is_the_file_alone(tmp_path):
    alone, beside = (Settings(home=tmp_path, online=OnlineSettings(redis_url=url)) for url in (None, "redis://127.0.0.1:1/0"))
    for settings, served, streamed in ((alone, OnlineWriter, OnlineWriter), (beside, RedisWriter, MirroredWriter)):
        with closing(open_writer(tmp_path, settings)) as online, closing(open_stream_writer(tmp_path, settings)) as stream:
            assert (type(online), type(stream)) == (served, streamed)
    with closing(open_writer(tmp_path)) as online:
        assert type(online) is OnlineWriter


def test_a_stream_without_redis_does_not_load_its_client():
    script = "import sys, pipelines.stream.worker; print('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "False\n"
