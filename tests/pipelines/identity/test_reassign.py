"""Through the whole ingest: people merged and split again have just the events that they had."""

import json
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pipelines import identity, ingest, tables
from pipelines.identity import graph
from pipelines.settings import Settings
from pipelines.vault import open_vault

START = datetime(2024, 3, 1, 10, tzinfo=UTC)
ALLOWED = {"consent": {"categoryPreferences": {"personalization": True}}}
USERS, DEVICES, ADDRESSES = ["ann", "bob", "cy"], ["d1", "d2", None], ["one@example.org", "two@example.org"]


def call(number: int, user: str | None, device: str | None, address: str | None = None) -> dict:
    time = (START + timedelta(minutes=number)).isoformat()
    who = {name: value for name, value in (("userId", user), ("anonymousId", device)) if value}
    common = {"messageId": f"m{number}", "timestamp": time, "receivedAt": time, "context": ALLOWED, **who}
    if address:
        return common | {"type": "identify", "traits": {"email": address}}
    product = {"product_id": f"i{number % 3}", "price": 5.0}
    return common | {"type": "track", "event": "Product Viewed", "properties": product}


class Home:
    """A home that calls come into, one file after the other."""

    def __init__(self, path: Path) -> None:
        self.path, self.settings, self.files = path, Settings(home=path), 0

    def hears(self, calls: list[dict]) -> None:
        self.files += 1
        file = self.path.parent / f"{self.path.name}-{self.files}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in calls))
        ingest.ingest(self.path, [file], mapping=None, settings=self.settings)

    def edge(self, one: str, other: str) -> str:
        """A probable link between two user ids."""
        with closing(open_vault(self.path)) as vault:
            left, right = sorted(vault.pseudonym("user_id", name) for name in (one, other))
        edges = tables.read(self.path, tables.IDENTITY_EDGES)
        name = identity.link_id(left, right)
        now = pd.Timestamp(START + timedelta(days=1))
        row = {"link_id": name, "left": left, "right": right, "kind": "probabilistic", "state": "link", "weight": 0.999, "evidence": "{}"}
        fresh = pd.DataFrame([row | {"decided_by": None, "created_timestamp": now}])
        rest = edges[edges["link_id"] != name]
        tables.write(self.path, tables.IDENTITY_EDGES, pd.concat([rest, fresh]) if len(rest) else fresh)
        ingest.reassign(self.path, settings=self.settings)
        return name

    def cut(self, link: str) -> None:
        graph.unmerge(self.path, link, by="eve")
        ingest.reassign(self.path, settings=self.settings)

    def histories(self) -> list[list[str]]:
        """The message ids of each customer."""
        events = tables.read(self.path, tables.EVENTS, ["event_id", "customer_id"])
        return sorted(events.groupby("customer_id")["event_id"].agg(sorted).tolist())

    def customers(self) -> dict[str, str]:
        """Event -> customer."""
        events = tables.read(self.path, tables.EVENTS, ["event_id", "customer_id"])
        return dict(zip(events["event_id"], events["customer_id"], strict=True))


def test_a_split_gives_both_their_own_customer_id_and_events_back(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.hears([call(1, "ann", "d1"), call(2, "bob", "d2"), call(3, "ann", None), call(4, None, "d2")])
    before = home.customers()
    link = home.edge("ann", "bob")
    assert len(home.histories()) == 1
    home.hears([call(5, "ann", "d1"), call(6, "bob", None)])  # while they are one
    home.cut(link)
    after = home.customers()
    assert {event: after[event] for event in before} == before
    assert [[event.split(":")[0] for event in events] for events in home.histories()] == [["m1", "m3", "m5"], ["m2", "m4", "m6"]]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("view"), st.sampled_from([*USERS, None]), st.sampled_from(DEVICES)).filter(lambda step: step[1] or step[2]),
        st.tuples(st.just("identify"), st.sampled_from(USERS), st.sampled_from(ADDRESSES)),
        st.tuples(st.just("merge"), st.sampled_from(USERS), st.sampled_from(USERS)).filter(lambda step: step[1] < step[2]),
        st.tuples(st.just("split"), st.integers(0, 3), st.none()),
    ),
    min_size=4,
    max_size=8,
)


@pytest.mark.slow
@settings(max_examples=3, phases=[Phase.generate])
@given(STEPS)
def test_after_any_merges_and_splits_the_events_are_those_of_a_home_without_the_undone_links(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple]
) -> None:
    folder = tmp_path_factory.mktemp("worlds")
    home, plain = Home(folder / "home"), Home(folder / "plain")
    calls = [call(0, "ann", "d1"), call(1, "bob", "d2"), call(2, "cy", None)]
    home.hears(calls)
    links: dict[str, tuple[str, str]] = {}
    for number, (step, one, other) in enumerate(steps, start=3):
        if step == "merge":
            links[home.edge(one, other)] = (one, other)
        elif step == "split" and one < len(links):
            cut = sorted(links)[one]
            home.cut(cut)
            del links[cut]
        elif step in ("view", "identify"):
            made = call(number, one, other) if step == "view" else call(number, one, None, other)
            calls.append(made)
            home.hears([made])
    plain.hears(calls)
    for one, other in links.values():
        plain.edge(one, other)
    assert home.histories() == plain.histories()
    assert sum(map(len, home.histories())) == len({made["messageId"] for made in calls})
