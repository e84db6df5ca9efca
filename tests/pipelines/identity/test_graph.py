"""A small home: why people are one, and what becomes of decisions."""

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from pipelines import identity, tables
from pipelines.errors import InputError
from pipelines.identity import graph
from pipelines.vault import Vault, open_vault

START = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    with closing(open_vault(tmp_path)) as opened:
        yield opened


class Shop:
    """Its people by their raw names; every row of `seen` is user id, address, device and hour."""

    def __init__(self, home: Path, vault: Vault) -> None:
        self.home, self.vault, self.seen = home, vault, []

    def name(self, raw: str) -> str:
        return self.vault.pseudonym(*raw.split(":", 1))

    def sees(self, *names: str, hour: int) -> None:
        row = dict.fromkeys(identity.LINK_COLUMNS)
        for raw in names:
            kind, name = raw.split(":", 1)[0], self.name(raw)
            row[kind] = name if kind in ("email", "phone") else name.split(":")[1]
        time = pd.Timestamp(START + timedelta(hours=hour))
        self.seen.append(row | {"event_timestamp": time, "created_timestamp": time})

    def edge(self, one: str, other: str, state: str, *, hour: int = 0, weight: float = 0.7) -> str:
        left, right = sorted((self.name(one), self.name(other)))
        row = {
            "link_id": identity.link_id(left, right),
            "left": left,
            "right": right,
            "kind": "probabilistic",
            "state": state,
            "weight": weight,
            "evidence": '{"last_name": ["equal", 8.1]}',
            "decided_by": None,
            "created_timestamp": pd.Timestamp(START + timedelta(hours=hour)),
        }
        edges = tables.read(self.home, tables.IDENTITY_EDGES)
        tables.write(self.home, tables.IDENTITY_EDGES, pd.concat([edges, pd.DataFrame([row])]) if len(edges) else pd.DataFrame([row]))
        return row["link_id"]

    def resolves(self) -> dict[str, str]:
        links, edges = pd.DataFrame(self.seen, columns=list(identity.LINK_COLUMNS)), tables.read(self.home, tables.IDENTITY_EDGES)
        found = identity.resolve(links, edges=edges, held=tables.read(self.home, tables.IDENTITIES))
        tables.write(self.home, tables.IDENTITY_LINKS, links)
        tables.write(self.home, tables.IDENTITIES, found)
        return dict(zip(found["identifier"], found["customer_id"], strict=True))

    def customer(self, raw: str) -> str:
        return graph.find(self.home, self.name(raw))


@pytest.fixture
def shop(tmp_path: Path, vault: Vault) -> Shop:
    made = Shop(tmp_path, vault)
    made.sees("anonymous_id:d1", hour=0)
    made.sees("user_id:ann", "anonymous_id:d1", hour=1)
    made.sees("user_id:ann", "email:ann@example.org", hour=2)
    made.sees("user_id:ann2", "email:ann@example.org", hour=3)
    made.sees("user_id:ann", "anonymous_id:d1", hour=4)
    made.sees("user_id:bob", "phone:+491511234567", hour=5)
    made.resolves()
    return made


# -- find --------------------------------------------------------------------------------------------------------------


def test_a_person_is_found_by_whatever_they_are_called(shop: Shop, vault: Vault) -> None:
    ann = shop.customer("user_id:ann")
    for who in (ann, shop.name("email:ann@example.org"), "user_id:ann", "email: Ann@Example.org", "ann@example.org", "ann", "d1"):
        assert graph.find(shop.home, who, vault) == ann
    for who in ("+49 151 1234567", "phone:+491511234567", "bob"):
        assert graph.find(shop.home, who, vault) == shop.customer("user_id:bob")


def test_a_name_may_stand_for_its_kinds_and_an_address_for_nothing_else(vault: Vault) -> None:
    def kinds(who: str) -> list[str]:
        return [name.partition(":")[0] for name in graph.spellings(who, vault)]

    assert kinds("ann") == ["user_id", "email", "anonymous_id"], "a phone number has digits"
    assert kinds("+49 151") == ["user_id", "email", "phone", "anonymous_id"]
    assert kinds("user_id:ann") == ["user_id"]
    address = vault.pseudonym("email", "ann@example.org")
    for who in ("ann@example.org", " ann@example.org ", "email:ann@example.org", "user_id:Ann@example.org", "anonymous_id:ann@example.org"):
        assert graph.spellings(who, vault) == [address]
    assert graph.spellings(address, None) == [address]
    for nothing in ("", "  ", "phone:none"):
        assert graph.spellings(nothing, vault) == []


def test_a_former_customer_id_leads_to_the_person_of_today(shop: Shop, vault: Vault) -> None:
    former = shop.customer("user_id:bob")
    shop.edge("user_id:bob", "user_id:ann", "link", hour=6)
    shop.resolves()
    assert graph.find(shop.home, former, vault) == shop.customer("user_id:ann") != former


def test_nobody_is_found_and_the_name_is_not_repeated(shop: Shop, vault: Vault) -> None:
    for who in ("secret@example.org", "user_id:secret", "c" + "0" * 16, "user_id:" + "0" * 32):
        with pytest.raises(InputError) as error:
            graph.find(shop.home, who, vault)
        assert "secret" not in str(error.value)
    with pytest.raises(InputError):
        graph.find(shop.home, "ann")  # a raw name needs the vault


# -- explain -----------------------------------------------------------------------------------------------------------


def test_an_explanation_connects_all_identifiers_by_the_earliest_links(shop: Shop) -> None:
    review = shop.edge("user_id:bob", "user_id:ann2", "review")
    why = graph.explain(shop.home, shop.customer("user_id:ann"))
    names = {shop.name(raw) for raw in ("user_id:ann", "user_id:ann2", "anonymous_id:d1", "email:ann@example.org")}
    assert set(why.identifiers) == names
    assert [(link.created_timestamp, link.kind) for link in why.path] == [(START + timedelta(hours=hour), "exact") for hour in (1, 2, 3)]
    assert {name for link in why.path for name in (link.left, link.right)} == names
    assert [link.link_id for link in why.reviews] == [review]
    assert why.others == ()


def test_an_explanation_tells_probable_links_with_weight_and_evidence(shop: Shop, vault: Vault) -> None:
    link = shop.edge("user_id:bob", "user_id:ann2", "link", hour=9, weight=0.995)
    shop.resolves()
    why = graph.explain(shop.home, "bob", vault=vault)
    found = next(step for step in why.path if step.link_id == link)
    assert (found.kind, found.weight, found.evidence) == ("probabilistic", 0.995, '{"last_name": ["equal", 8.1]}')
    assert len(why.path) == len(why.identifiers) - 1 == 5


def test_an_address_of_a_desk_explains_nothing(shop: Shop) -> None:
    for n in range(identity.MAX_USERS + 1):
        shop.sees(f"user_id:u{n}", "email:desk@example.org", "phone:+491519999999", hour=10 + n)
        shop.sees(f"anonymous_id:t{n}", "email:desk@example.org", f"phone:{n}", hour=20 + n)
    shop.resolves()
    why = graph.explain(shop.home, shop.customer("phone:1"))
    assert set(why.identifiers) == {shop.name("phone:1"), shop.name("anonymous_id:t1")}
    assert len(why.path) == 1
    assert len(graph.explain(shop.home, shop.customer("user_id:u1")).identifiers) == 1


# -- decisions ---------------------------------------------------------------------------------------------------------


def test_an_unmerged_link_splits_and_stays_cut(shop: Shop) -> None:
    before = shop.customer("user_id:ann")
    link = identity.link_id(shop.name("user_id:ann2"), shop.name("email:ann@example.org"))
    assert link in {step.link_id for step in graph.explain(shop.home, before).path}
    decision = graph.unmerge(shop.home, link, by="eve")
    assert (decision.link.state, decision.link.kind, decision.link.decided_by, decision.is_one) == ("cut", "manual", "eve", False)
    shop.sees("user_id:ann2", "email:ann@example.org", hour=30)
    shop.resolves()
    assert shop.customer("user_id:ann") == before != shop.customer("user_id:ann2")
    assert link in {row.link_id for row in graph.explain(shop.home, shop.customer("user_id:ann2")).others}
    assert graph.decide(shop.home, link, accept=True, by="eve").is_one  # and can be taken back
    shop.resolves()
    assert shop.customer("user_id:ann2") == before


def test_an_unmerge_says_when_other_links_still_join_the_two(shop: Shop) -> None:
    shop.sees("user_id:ann2", "phone:+49151000", hour=8)
    shop.sees("user_id:ann", "phone:+49151000", hour=9)
    shop.resolves()
    link = identity.link_id(shop.name("user_id:ann2"), shop.name("email:ann@example.org"))
    assert graph.unmerge(shop.home, link, by="eve").is_one


def test_unmerging_a_probable_link_cuts_its_row(shop: Shop) -> None:
    link = shop.edge("user_id:bob", "user_id:ann2", "link", hour=9)
    assert not graph.unmerge(shop.home, link, by="eve").is_one
    edges = tables.read(shop.home, tables.IDENTITY_EDGES)
    assert edges[["state", "kind", "decided_by"]].values.tolist() == [["cut", "probabilistic", "eve"]]


def test_reviews_come_with_their_customers_the_likeliest_first(shop: Shop) -> None:
    assert graph.reviews(shop.home).empty
    shop.edge("user_id:bob", "user_id:ann", "review", weight=0.6)
    shop.edge("user_id:bob", "user_id:ann2", "review", weight=0.9)
    shop.edge("user_id:bob", "anonymous_id:d1", "link")
    waiting = graph.reviews(shop.home)
    assert waiting["weight"].tolist() == [0.9, 0.6]
    assert set(waiting[["left_customer", "right_customer"]].to_numpy().ravel()) == {
        shop.customer("user_id:ann"),
        shop.customer("user_id:bob"),
    }


@pytest.mark.parametrize("accept", [True, False])
def test_a_decided_review_links_or_never_comes_back(shop: Shop, accept: bool) -> None:
    link = shop.edge("user_id:bob", "user_id:ann", "review")
    decision = graph.decide(shop.home, link, accept=accept, by="eve")
    assert (decision.is_one, decision.link.state) == (accept, "link" if accept else "reject")
    assert graph.reviews(shop.home).empty
    shop.resolves()
    assert (shop.customer("user_id:ann") == shop.customer("user_id:bob")) == accept
    if accept:  # known since the newest link was, so that no training set before it knows it
        assert decision.link.created_timestamp == START + timedelta(hours=5)


def test_a_link_that_is_not_there_is_refused(shop: Shop) -> None:
    with pytest.raises(InputError, match="no"):
        graph.unmerge(shop.home, "l" + "0" * 16, by="eve")
    with pytest.raises(InputError, match="review"):
        graph.decide(shop.home, "l" + "0" * 16, accept=True, by="eve")
