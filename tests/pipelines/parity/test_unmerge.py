"""People who were taken for one and are two again: from then on online equals offline."""

import numpy as np
import pytest

from pipelines import identity, ingest, tables
from pipelines.identity import graph
from pipelines.log import open_log
from pipelines.parity import replaying
from pipelines.vault import open_vault

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "control"])
def test_stream_that_starts_on_tables_with_a_cut_goes_on_as_they_do(town, is_cut) -> None:
    told = [town.call(n, 40 * n, device="d1" if n % 2 else None, user=None if n % 2 else "ann", item=f"i{n % 3}") for n in range(12)]
    told += [town.call(20, 500, device="d1", user="ann", kind="identify"), town.call(21, 510, device="d1", kind="order")]
    log, vault = open_log(town.home, settings=town.settings), open_vault(town.home)
    log.append(town.logged(told))
    names = [vault.pseudonym(kind, name) for kind, name in (("user_id", "ann"), ("anonymous_id", "d1"))]
    log.close()
    vault.close()
    ingest.drain(town.home, settings=town.settings)
    if is_cut:
        graph.unmerge(town.home, identity.link_id(*names), by="eve")
        ingest.reassign(town.home, settings=town.settings)
    stage = replaying.go_on(town.home, settings=town.settings, now_us=town.us(600), probes=40, rng=np.random.default_rng(3))
    assert stage.compared.by_feature == {}, stage.compared.examples
    assert stage.what["events"] == 15
    assert {"customer_activity", "customer_item", "item_activity"} <= set(stage.what["views"])
    assert tables.read(town.home, tables.IDENTITIES)["customer_id"].nunique() == (2 if is_cut else 1)
