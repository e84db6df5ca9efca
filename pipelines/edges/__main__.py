"""`python -m pipelines.edges`: move events from every configured broker into the log of RAPPORT_HOME, until SIGTERM or SIGINT."""

import logging
import signal
import sys
import threading

from pipelines.edges.forwarding import Edge, forward, open_edges
from pipelines.errors import PipelineError
from pipelines.log.store import open_log
from pipelines.log_lines import write_lines
from pipelines.settings import Settings
from pipelines.vault import Vault, open_vault

_log = logging.getLogger("rapport.edges")


def main() -> int:
    """Run until told to stop. Returns 0, or 1 when an edge ended by itself."""
    settings, stop, failed = Settings(), threading.Event(), threading.Event()
    write_lines(settings.serving.log_format)
    for client in ("aiokafka", "aio_pika", "aiormq"):
        logging.getLogger(client).setLevel(logging.CRITICAL)  # the edge says the same once, without addresses
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    edges = open_edges(settings)
    if not edges:
        _log.info("no broker is configured; set RAPPORT_EDGES__REDIS_URL, __KAFKA_SERVERS or __RABBITMQ_URL")
        return 0
    try:
        vault = open_vault(settings.home, master=settings.master_key)
    except PipelineError as error:
        _log.critical("%s", error)
        return 1
    threads = [threading.Thread(target=_run, args=(edge, vault, settings, stop, failed), name=edge.name) for edge in edges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    vault.close()
    return int(failed.is_set())


def _run(edge: Edge, vault: Vault, settings: Settings, stop: threading.Event, failed: threading.Event) -> None:
    try:
        log = open_log(settings.home, settings=settings, vault=vault, consumer=f"edge-{edge.name}")
        _log.info("%s: forwarding", edge.name)
        forward(edge, log, vault=vault, settings=settings, stop=stop)
        log.close()
    except Exception as error:  # a defect, or a home that is not usable: whoever supervises this process shall see it end
        _log.critical("%s: ended by %s", edge.name, error if isinstance(error, PipelineError) else type(error).__name__)
        failed.set()
        stop.set()
    finally:
        edge.close()


if __name__ == "__main__":
    sys.exit(main())
