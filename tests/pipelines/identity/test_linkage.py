"""Known truth: FEBRL's three sets, households and namesakes made of them, and a home with a vault."""

import json
import logging
from collections.abc import Iterator
from contextlib import closing
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipelines import identity, tables
from pipelines.identity import graph, linkage
from pipelines.identity.linkage import Linkage, LinkageSettings
from pipelines.vault import Fact, Vault, open_vault

QUICK = LinkageSettings(sample_pairs=50_000)
FIRST_NAMES = ["amelia", "bruno", "clara", "dario", "elena", "felix", "greta", "hanno", "ines", "jonas", "karla", "leon", "mira", "nils"]
LAST_NAMES = [
    "arnold",
    "becker",
    "conrad",
    "dietz",
    "engel",
    "fuchs",
    "graf",
    "huber",
    "iwan",
    "jansen",
    "krause",
    "lorenz",
    "meyer",
    "noll",
]
CITIES = ["aachen", "bremen", "celle", "dresden", "essen"]


def pairs_of(people: pd.DataFrame) -> set[tuple[str, str]]:
    """Every pair that is one person in truth."""
    groups = people.groupby("person")["identifier"].agg(sorted)
    return {pair for group in groups for pair in combinations(group, 2)}


def quality(found: Linkage, people: pd.DataFrame) -> tuple[float, float]:
    """Pairwise precision and recall of the customers that the links make: of all pairs that end up in one, not of the links alone."""
    links = found.pairs[found.pairs["state"] == "link"]
    seen = pd.DataFrame({"user_id": people["identifier"].str.removeprefix("user_id:"), "anonymous_id": None, "email": None, "phone": None})
    now = pd.Timestamp("2024-01-01", tz="UTC")
    seen = seen.assign(event_timestamp=now, created_timestamp=now)
    customers = identity.resolve(seen, edges=links.assign(created_timestamp=now))
    made = pairs_of(customers.rename(columns={"customer_id": "person"}))
    truth = pairs_of(people)
    return len(made & truth) / max(len(made), 1), len(made & truth) / len(truth)


def pairs_quality(found: Linkage, people: pd.DataFrame) -> tuple[float, float]:
    """The same of the links alone."""
    links = found.pairs[found.pairs["state"] == "link"]
    made, truth = set(zip(links["left"], links["right"], strict=True)), pairs_of(people)
    return len(made & truth) / max(len(made), 1), len(made & truth) / len(truth)


def invented(count: int, *, seed: int = 1) -> pd.DataFrame:
    """People who have nothing to do with each other, written without error."""
    rng = np.random.default_rng(seed)
    words = {"first_name": FIRST_NAMES, "last_name": LAST_NAMES, "city": CITIES}
    told = {name: rng.choice(some, count) for name, some in words.items()}
    born = pd.Timestamp("1950-01-01") + pd.to_timedelta(rng.integers(0, 18_000, count), unit="D")
    street = [f"{number} {word}weg" for number, word in zip(rng.integers(1, 200, count), rng.permutation(count), strict=True)]
    postcode = rng.integers(10_000, 99_999, count).astype(str)
    return pd.DataFrame(
        {
            "identifier": [f"user_id:{n:032x}" for n in range(count)],
            **told,
            "street": street,
            "postcode": postcode,
            "date_of_birth": born.strftime("%Y-%m-%d"),
        }
    )


# -- against known truth -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
def test_febrl_is_linked_without_labels_by_one_configuration(febrl: dict[int, pd.DataFrame], number: int) -> None:
    people = febrl[number]
    found = linkage.link(people)
    for precision, recall in (pairs_quality(found, people), quality(found, people)):
        assert precision >= 0.98
        assert recall >= 0.95
    truth = len(pairs_of(people)) / (len(people) * (len(people) - 1) / 2)
    assert found.prior == pytest.approx(truth, rel=0.05)  # it knows how many there are


@pytest.mark.slow
def test_febrl_with_shuffled_names_or_careless_thresholds_misses_the_target(febrl: dict[int, pd.DataFrame]) -> None:
    """The controls of the one above."""
    people = febrl[1]
    names = people[["first_name", "last_name", "date_of_birth"]].sample(frac=1, random_state=1)
    shuffled = people.assign(**{name: names[name].to_numpy() for name in names})
    assert quality(linkage.link(shuffled, settings=QUICK), people)[1] < 0.95
    crowd = pd.concat([people, _spouses(people)])
    careless = LinkageSettings(sample_pairs=50_000, link_probability=0.5, review_probability=0.5, personal_bits=-50)
    assert quality(linkage.link(crowd, settings=careless), crowd)[0] < 0.98
    assert quality(linkage.link(crowd, settings=QUICK), crowd)[0] >= 0.98


def _spouses(people: pd.DataFrame) -> pd.DataFrame:
    """For a third of the people somebody at the same address with the same last name."""
    one = people[people["identifier"].str.endswith("org")]
    chosen = one.sample(frac=0.33, random_state=3)
    other = one.drop(chosen.index).sample(len(chosen), random_state=4)
    own = {name: other[name].to_numpy() for name in ("first_name", "date_of_birth")}
    return chosen.assign(identifier=chosen["identifier"] + "-spouse", person=chosen["person"] + "-spouse", **own)


def test_strangers_are_not_linked_where_nobody_comes_twice() -> None:
    found = linkage.link(invented(400), settings=QUICK)
    assert found.pairs.empty
    assert found.prior < 1e-5


def test_the_same_records_give_the_same_answer_in_any_order() -> None:
    people = pd.concat([invented(150), invented(150).head(40).assign(identifier=lambda some: some["identifier"] + "b", first_name="x")])
    one, other = linkage.link(people, settings=QUICK), linkage.link(people.sample(frac=1, random_state=2), settings=QUICK)
    assert len(one.pairs) > 20
    pd.testing.assert_frame_equal(one.pairs, other.pairs)


def test_a_household_is_reviewed_and_not_linked() -> None:
    people = invented(200)
    twice = people.head(40).assign(identifier=lambda some: some["identifier"] + "b")
    spouse = people.iloc[100:120].assign(
        identifier=lambda some: some["identifier"] + "c", first_name=people["first_name"].iloc[:20].to_numpy(), date_of_birth="1961-02-03"
    )
    pairs = linkage.link(pd.concat([people, twice, spouse]), settings=QUICK).pairs.set_index(["left", "right"])["state"]
    ends = pairs.index.get_level_values("right").str[-1]
    assert (pairs[ends == "b"] == "link").sum() >= 38
    assert "link" not in set(pairs[ends == "c"])


def test_too_few_or_empty_records_give_no_pairs() -> None:
    for people in (invented(1), invented(0), pd.DataFrame({"identifier": ["user_id:1", "user_id:2"], "first_name": [None, None]})):
        found = linkage.link(people)
        assert list(found.pairs.columns) == ["left", "right", "state", "probability", "weight", "evidence"]
        assert found.pairs.empty


def test_nothing_is_printed_or_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        linkage.link(invented(60), settings=QUICK)
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("splink")]


# -- chains ------------------------------------------------------------------------------------------------------------


def found(*pairs: tuple[str, str, float]) -> pd.DataFrame:
    return pd.DataFrame(pairs, columns=["left", "right", "weight"]).assign(state="link")


def test_a_lone_link_between_two_groups_is_no_bridge() -> None:
    group = [(one, other, 20.0) for names in ("abc", "xyz") for one, other in combinations(names, 2)]
    bridged = linkage._bridges(found(*group, ("c", "x", 8.0)), ())
    assert bridged.tolist() == [False] * 6 + [True]
    assert not linkage._bridges(found(*group, ("c", "x", 8.0)).iloc[:6], ()).any()
    assert not linkage._bridges(found(("a", "b", 20.0), ("b", "c", 20.0)), ()).any()  # one pair that no key brought together is no reason


def test_people_who_were_told_apart_are_joined_by_no_chain() -> None:
    chain = found(("a", "b", 30.0), ("b", "c", 20.0))
    assert linkage._bridges(chain, [("a", "c")]).tolist() == [False, True]
    assert linkage._bridges(chain, [("a", "b")]).any()
    assert not linkage._bridges(chain, [("a", "elsewhere")]).any()


# -- a home ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    with closing(open_vault(tmp_path)) as opened:
        yield opened


@pytest.fixture
def told(tmp_path: Path, vault: Vault) -> pd.DataFrame:
    """60 people of whom ten have two accounts, with what they told in the vault and their user ids in the tables."""
    people = invented(60)
    twice = people.head(10).assign(identifier=[f"user_id:{n + 100:032x}" for n in range(10)])
    everybody = pd.concat([people, twice], ignore_index=True)
    fields = [name for name in everybody.columns if name != "identifier"]
    vault.remember(Fact(row["identifier"], name, row[name], "shop", 1) for _, row in everybody.iterrows() for name in fields)
    now = pd.Timestamp("2024-05-01", tz="UTC")
    links = pd.DataFrame(
        {"user_id": everybody["identifier"].str.removeprefix("user_id:"), "anonymous_id": None, "email": None, "phone": None}
    )
    links = links.assign(event_timestamp=now, created_timestamp=now)
    tables.write(tmp_path, tables.IDENTITY_LINKS, links)
    tables.write(tmp_path, tables.IDENTITIES, identity.resolve(links))
    return everybody


def rows(home: Path) -> pd.DataFrame:
    return tables.read(home, tables.IDENTITY_EDGES).sort_values(["left", "right"]).reset_index(drop=True)


def test_a_run_writes_edges_that_join_the_accounts_and_no_value(tmp_path: Path, told: pd.DataFrame, vault: Vault) -> None:
    done = linkage.run(tmp_path, settings=QUICK, vault=vault)
    edges = rows(tmp_path)
    assert (done.records, done.links, done.decided) == (70, len(edges[edges["state"] == "link"]), 0)
    assert done.links == 10
    assert set(edges["kind"]) == {"probabilistic"}
    assert set(edges["created_timestamp"]) == {pd.Timestamp("2024-05-01", tz="UTC")}
    text = " ".join(edges["evidence"])
    assert json.loads(edges["evidence"][0])["last_name"][0] == "equal"
    assert not [value for name in told.columns for value in told[name] if f'"{value}"' in text]
    customers = identity.resolve(tables.read(tmp_path, tables.IDENTITY_LINKS), edges=edges)
    assert customers["customer_id"].nunique() == 60


def test_a_run_again_finds_the_same_also_when_the_people_were_merged_meanwhile(tmp_path: Path, told: pd.DataFrame, vault: Vault) -> None:
    linkage.run(tmp_path, settings=QUICK, vault=vault)
    before = rows(tmp_path)
    links = tables.read(tmp_path, tables.IDENTITY_LINKS)
    later = links.head(1).assign(created_timestamp=pd.Timestamp("2024-06-01", tz="UTC"))
    tables.write(tmp_path, tables.IDENTITY_LINKS, pd.concat([links, later]))
    tables.write(tmp_path, tables.IDENTITIES, identity.resolve(links, edges=before))
    linkage.run(tmp_path, settings=QUICK, vault=vault)
    pd.testing.assert_frame_equal(rows(tmp_path), before)  # with the times at which they were first known


def test_what_a_person_decided_stays_decided(tmp_path: Path, told: pd.DataFrame, vault: Vault) -> None:
    linkage.run(tmp_path, settings=QUICK, vault=vault)
    cut, rejected, confirmed = rows(tmp_path)["link_id"][:3]
    graph.unmerge(tmp_path, cut, by="ann")
    graph.decide(tmp_path, rejected, accept=False, by="ann")
    graph.decide(tmp_path, confirmed, accept=True, by="ann")
    before = rows(tmp_path)
    done = linkage.run(tmp_path, settings=QUICK, vault=vault)
    columns = ["link_id", "left", "right", "state", "decided_by", "created_timestamp"]  # one person fewer weighs a little otherwise
    pd.testing.assert_frame_equal(rows(tmp_path)[columns], before[columns])
    assert done.decided == 2  # a confirmed pair is one person, and not compared


def test_an_unmerged_exact_link_is_not_found_again_by_what_its_people_told(tmp_path: Path, told: pd.DataFrame, vault: Vault) -> None:
    """The two accounts of somebody, who gave both one address: cut from it, one stays alone."""
    now = pd.Timestamp("2024-05-01", tz="UTC")
    one, other = told["identifier"][0], told["identifier"][60]
    seen = pd.DataFrame(
        [
            {"user_id": name.removeprefix("user_id:"), "email": "email:" + "e" * 32, "event_timestamp": now, "created_timestamp": now}
            for name in (one, other)
        ]
    )
    links = pd.concat([tables.read(tmp_path, tables.IDENTITY_LINKS), seen.assign(anonymous_id=None, phone=None)])
    tables.write(tmp_path, tables.IDENTITY_LINKS, links)
    tables.write(tmp_path, tables.IDENTITIES, identity.resolve(links))
    linkage.run(tmp_path, settings=QUICK, vault=vault)
    assert identity.resolve(links, edges=rows(tmp_path))["customer_id"].nunique() == 60
    graph.unmerge(tmp_path, identity.link_id(other, "email:" + "e" * 32), by="ann")
    linkage.run(tmp_path, settings=QUICK, vault=vault)
    customers = identity.resolve(links, edges=rows(tmp_path)).set_index("identifier")["customer_id"]
    assert customers[one] != customers[other]
