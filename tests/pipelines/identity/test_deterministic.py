import hashlib
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import identity
from pipelines.identity import deterministic
from pipelines.sources import connect

START = datetime(2024, 1, 1, tzinfo=UTC)
Row = tuple[str | None, str | None, str | None, int]


def at(hour: int) -> pd.Timestamp:
    return pd.Timestamp(START + timedelta(hours=hour))


def links(*rows: Row) -> pd.DataFrame:
    """Rows of anonymous id, user id, e-mail and hour."""
    return calls(*((*row[:3], None, row[3]) for row in rows))


def calls(*rows: tuple[str | None, str | None, str | None, str | None, int]) -> pd.DataFrame:
    """The same with a phone number before the hour."""
    frame = pd.DataFrame(rows, columns=["anonymous_id", "user_id", "email", "phone", "hour"], dtype="object")
    times = [at(int(hour)) for hour in frame["hour"]]
    return frame.drop(columns="hour").assign(event_timestamp=times, created_timestamp=times)


def edges(*rows: tuple[str, str, str, int]) -> pd.DataFrame:
    """Rows of the table of edges: one end, the other, state, hour."""
    made = [(min(one, other), max(one, other), state, at(hour)) for one, other, state, hour in rows]
    return pd.DataFrame(made, columns=["left", "right", "state", "created_timestamp"])


def whose(frame: pd.DataFrame) -> dict[str, str]:
    """Identifier -> customer; for a shared anonymous id the latest."""
    return dict(zip(frame["identifier"], frame["customer_id"], strict=True))


def customers(*rows: Row) -> dict[str, str]:
    """Identifier -> customer; for a shared anonymous id the latest."""
    resolved = identity.resolve(links(*rows))
    return dict(zip(resolved["identifier"], resolved["customer_id"], strict=True))


def known(*rows: Row) -> dict[str, pd.Timestamp]:
    resolved = identity.resolve(links(*rows))
    return dict(zip(resolved["identifier"], resolved["created_timestamp"], strict=True))


def assigned(seen: pd.DataFrame, rows: pd.DataFrame) -> list[str | None]:
    return owners(rows, identity.resolve(seen))


def owners(rows: pd.DataFrame, identities: pd.DataFrame) -> list[str | None]:
    """The customer of each row, in order."""
    with connect() as db:
        db.register("identities", identities)
        db.register("asked", rows.assign(place=range(len(rows))))
        found = db.sql(f"SELECT owner_id FROM ({identity.assigned_sql('asked', 'identities')}) ORDER BY place").fetchall()
    return [owner for (owner,) in found]


def test_a_lone_identifier_is_a_customer_named_after_it() -> None:
    digest = hashlib.blake2b(b"anonymous_id:a").hexdigest()[:16]
    assert customers(("a", None, None, 0)) == {"anonymous_id:a": f"c{digest}"}


def test_no_links_give_an_empty_frame_with_the_same_columns() -> None:
    assert list(identity.resolve(links()).columns) == ["identifier", "customer_id", "event_timestamp", "created_timestamp"]


def test_a_login_joins_the_visitor_and_the_user_under_the_first_seen() -> None:
    found = customers(("a", None, None, 0), ("a", "u", None, 2), ("b", "u", None, 3))
    assert set(found.values()) == {customers(("a", None, None, 0))["anonymous_id:a"]}


def test_an_address_joins_two_user_ids() -> None:
    found = customers((None, "u", "email:1", 0), (None, "v", "email:1", 1), (None, "w", "email:2", 2))
    assert found["user_id:u"] == found["user_id:v"] != found["user_id:w"]


def test_a_user_id_that_is_an_address_is_the_address() -> None:
    found = customers((None, "email:1", None, 0), (None, "u", "email:1", 1))
    assert set(found) == {"email:1", "user_id:u"}
    assert len(set(found.values())) == 1


def test_a_shared_device_does_not_join_two_people() -> None:
    rows = (("tv", None, None, 0), ("tv", "ann", None, 2), ("tv", "bob", None, 5), ("tv", "ann", None, 8))
    found = customers(*rows)
    assert found["user_id:ann"] != found["user_id:bob"]
    # The control: on a device of his own, with his address, bob is one person.
    assert len(set(customers(("pc", "bob", "email:b", 5), ("tab", None, "email:b", 6)).values())) == 1


def test_events_on_a_shared_device_belong_to_the_latest_login() -> None:
    seen = links(("tv", None, None, 0), ("tv", "ann", None, 2), ("tv", "bob", None, 5), ("tv", "ann", None, 8))
    hours = [0, 1, 2, 4, 5, 7, 8, 99]
    rows = pd.DataFrame({"anonymous_id": "tv", "user_id": None, "event_timestamp": [at(h) for h in hours]})
    names = dict(
        zip(assigned(seen, pd.DataFrame({"anonymous_id": None, "user_id": ["ann", "bob"], "event_timestamp": at(9)})), "AB", strict=True)
    )
    assert "".join(names[str(owner)] for owner in assigned(seen, rows)) == "AAAABBAA"


def test_a_user_id_decides_before_the_device() -> None:
    seen = links(("tv", "ann", None, 2), ("tv", "bob", None, 5))
    rows = pd.DataFrame({"anonymous_id": "tv", "user_id": ["ann", "bob"], "event_timestamp": [at(7), at(1)]})
    assert assigned(seen, rows) == [customers(("tv", "ann", None, 2))["user_id:ann"], customers((None, "bob", None, 5))["user_id:bob"]]


def test_a_later_login_on_the_device_changes_nothing_before_it() -> None:
    before = links(("tv", None, None, 0), ("tv", "ann", None, 2))
    after = pd.concat([before, links(("tv", "bob", None, 5))])
    rows = pd.DataFrame({"anonymous_id": ["tv"] * 5, "user_id": None, "event_timestamp": [at(h) for h in range(5)]})
    assert assigned(before, rows) == assigned(after, rows)


def test_an_unknown_identifier_has_no_owner() -> None:
    rows = pd.DataFrame({"anonymous_id": ["x"], "user_id": None, "event_timestamp": at(0)})
    assert assigned(links(("a", None, None, 0)), rows) == [None]


def test_the_link_time_is_when_the_chain_to_the_first_identifier_was_complete() -> None:
    # u (hour 0) is the root; b met v at hour 1, and v was tied to u by an address only at hours 6 and 9.
    times = known((None, "u", None, 0), ("b", "v", None, 1), (None, "v", "email:1", 6), (None, "u", "email:1", 9))
    assert times == {"user_id:u": at(0), "anonymous_id:b": at(9), "user_id:v": at(9), "email:1": at(9)}


def test_the_first_identifier_is_known_from_its_own_first_sight() -> None:
    assert known(("a", None, None, 0), ("a", "u", None, 5)) == {"anonymous_id:a": at(0), "user_id:u": at(5)}


def test_of_two_links_between_the_same_two_the_earlier_counts() -> None:
    assert known((None, "u", None, 0), ("a", "u", None, 7), ("a", "u", None, 3))["anonymous_id:a"] == at(3)


ROWS = st.tuples(
    st.sampled_from([None, "a", "b", "c", "d"]),
    st.sampled_from([None, "u", "v", "w", "x"]),
    st.sampled_from([None, "email:1", "email:2", "email:3"]),
    st.integers(0, 30),
).filter(lambda row: any(row[:3]))


@settings(max_examples=60)
@given(st.lists(ROWS, min_size=1, max_size=14), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(rows: list[Row], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    pd.testing.assert_frame_equal(identity.resolve(links(*rows)), identity.resolve(links(*shuffled)))


@settings(max_examples=60)
@given(st.lists(ROWS.map(lambda row: (None, *row[1:])).filter(lambda row: any(row[:3])), min_size=1, max_size=14))
def test_without_devices_people_and_link_times_are_those_of_growing_sets(rows: list[Row]) -> None:
    """Against sets merged hour by hour: who is whose, and the first hour at which the root is in the set."""
    sets: dict[str, frozenset[str]] = {}
    first: dict[str, int] = {}
    grown: list[tuple[int, dict[str, frozenset[str]]]] = []
    for _, user, email, hour in sorted(rows, key=lambda row: row[3]):
        names = [name for name in (f"user_id:{user}" if user else None, email) if name]
        merged = frozenset(names).union(*(sets.get(name, frozenset()) for name in names))
        for name in names:
            first.setdefault(name, hour)
        sets = sets | dict.fromkeys(merged, merged)
        grown.append((hour, sets))
    resolved = identity.resolve(links(*rows)).set_index("identifier")
    for name, others in sets.items():
        root = min(others, key=lambda n: (first[n], n.startswith("email:"), n))
        assert resolved.loc[name, "customer_id"] == "c" + hashlib.blake2b(root.encode()).hexdigest()[:16]
        assert resolved.loc[name, "created_timestamp"] == at(next(hour for hour, then in grown if root in then.get(name, ())))


@settings(max_examples=60)
@given(st.lists(ROWS, min_size=1, max_size=14))
def test_devices_never_join_people(rows: list[Row]) -> None:
    """Two known identifiers are one customer with the devices exactly if they are without them."""
    alone = [(None, *row[1:]) for row in rows if row[1] or row[2]]
    with_devices, without = customers(*rows), customers(*alone) if alone else {}
    for one in without:
        for other in without:
            assert (with_devices[one] == with_devices[other]) == (without[one] == without[other])


def test_many_identifiers_in_one_chain_are_one_customer() -> None:
    n = 20_000  # longer than any stack
    names = np.array([f"email:{i}" for i in range(n)], dtype=object)
    frame = pd.DataFrame(
        {
            "anonymous_id": None,
            "user_id": names[:-1],
            "email": names[1:],
            "phone": None,
            "event_timestamp": at(0),
            "created_timestamp": at(0),
        }
    )
    assert identity.resolve(frame)["customer_id"].nunique() == 1


# -- phones, and addresses that are nobody's ---------------------------------------------------------------------------


def test_a_phone_number_joins_two_user_ids() -> None:
    found = whose(
        identity.resolve(calls((None, "u", None, "phone:1", 0), (None, "v", None, "phone:1", 1), (None, "w", None, "phone:2", 2)))
    )
    assert found["user_id:u"] == found["user_id:v"] == found["phone:1"] != found["user_id:w"]


@pytest.mark.parametrize("column", [2, 3])
def test_an_address_of_more_user_ids_than_a_person_has_connects_nobody(column: int) -> None:
    def rows(users: int) -> list[tuple[str | None, ...]]:
        shared = {2: ("email:desk", None), 3: (None, "phone:desk")}[column]
        return [(f"device{n}", f"u{n}", *shared, n) for n in range(users)] + [("kiosk", None, *shared, 9)]

    joined = whose(identity.resolve(calls(*rows(identity.MAX_USERS))))  # type: ignore[arg-type]
    assert len(set(joined.values())) == 1
    apart = whose(identity.resolve(calls(*rows(identity.MAX_USERS + 1))))  # type: ignore[arg-type]
    assert len(set(apart.values())) == identity.MAX_USERS + 1 + 2  # and the address, and a device that only it was used on
    assert apart["anonymous_id:device1"] == apart["user_id:u1"]


def test_an_address_of_many_leaves_the_other_links_of_its_rows() -> None:
    rows = [(None, f"u{n}", "email:desk", f"phone:{n % 3}", n) for n in range(6)]
    found = whose(identity.resolve(calls(*rows)))
    assert found["user_id:u0"] == found["user_id:u3"] == found["phone:0"] != found["user_id:u1"]


# -- edges and cuts ----------------------------------------------------------------------------------------------------


def test_an_edge_joins_since_it_was_known_and_a_review_joins_nobody() -> None:
    seen = calls((None, "u", None, None, 0), (None, "v", None, None, 1))
    linked = identity.resolve(seen, edges=edges(("user_id:u", "user_id:v", "link", 7)))
    assert len(set(linked["customer_id"])) == 1
    assert linked.set_index("identifier").loc["user_id:v", "created_timestamp"] == at(7)
    for state in ("review", "reject", "cut"):
        assert len(set(identity.resolve(seen, edges=edges(("user_id:u", "user_id:v", state, 7)))["customer_id"])) == 2


def test_an_edge_to_somebody_never_seen_says_nothing() -> None:
    seen = calls((None, "u", None, None, 0))
    pd.testing.assert_frame_equal(identity.resolve(seen), identity.resolve(seen, edges=edges(("user_id:u", "user_id:gone", "link", 1))))


def test_an_edge_of_a_device_is_one_of_the_person_who_first_logged_in_on_it() -> None:
    seen = links(("tv", None, None, 0), ("tv", "ann", None, 2), ("tv", "bob", None, 5), (None, "eve", None, 6))
    found = whose(identity.resolve(seen, edges=edges(("anonymous_id:tv", "user_id:eve", "link", 7))))
    assert found["user_id:eve"] == found["user_id:ann"] != found["user_id:bob"]


def test_a_cut_holds_against_the_link_being_seen_again() -> None:
    cut = edges(("user_id:u", "email:1", "cut", 3))
    seen = links((None, "u", "email:1", 0), (None, "v", "email:1", 1))
    for later in (seen, pd.concat([seen, links((None, "u", "email:1", 8))])):
        found = whose(identity.resolve(later, edges=cut))
        assert found["user_id:u"] != found["email:1"] == found["user_id:v"]
    assert len(set(whose(identity.resolve(seen)).values())) == 1  # the control


def test_a_cut_login_gives_the_device_its_own_history() -> None:
    seen = links(("a", None, None, 0), ("a", "u", "email:1", 2))
    found = whose(identity.resolve(seen, edges=edges(("user_id:u", "anonymous_id:a", "cut", 3))))
    assert found["anonymous_id:a"] != found["user_id:u"] == found["email:1"]


def test_joins_are_the_links_that_people_are_formed_of() -> None:
    seen = links(("tv", "ann", "email:1", 2), ("tv", "bob", None, 5), ("tv", "ann", None, 8))
    known = edges(("user_id:bob", "user_id:cy", "link", 9), ("email:1", "user_id:ann", "cut", 3))
    found = deterministic.joins(pd.concat([seen, links((None, "cy", None, 0))]), edges=known)
    assert list(found.itertuples(index=False, name=None)) == [
        ("anonymous_id:tv", "user_id:ann", at(2)),
        ("user_id:bob", "user_id:cy", at(9)),
    ]


# -- what was held -----------------------------------------------------------------------------------------------------


def test_a_customer_id_survives_an_older_history_that_comes_later() -> None:
    before = links((None, "u", None, 5), ("b", "u", None, 6))
    held = identity.resolve(before)
    older = pd.concat([before, links((None, "u", "email:1", 1))])
    assert set(identity.resolve(older, held=held)["customer_id"]) == set(held["customer_id"])
    late = before.assign(event_timestamp=at(0))  # known as late as before: the ids do not move at all
    assert set(identity.resolve(late)["customer_id"]) == set(held["customer_id"])


def test_in_a_merge_the_customer_known_earlier_holds() -> None:
    before = links((None, "u", None, 5), (None, "v", None, 3))
    held = identity.resolve(before)
    merged = identity.resolve(pd.concat([before, links((None, "u", "email:1", 1), (None, "v", "email:1", 1))]), held=held)
    assert set(merged["customer_id"]) == {whose(held)["user_id:v"]}


def test_in_a_split_the_part_with_the_anchor_keeps_the_id_and_the_other_gets_its_own_back() -> None:
    alone = links((None, "u", None, 0), (None, "v", None, 1))
    own = whose(identity.resolve(alone))
    joined = pd.concat([alone, links((None, "u", "email:1", 4), (None, "v", "email:1", 5))])
    held = identity.resolve(joined)
    split = whose(identity.resolve(joined, edges=edges(("user_id:v", "email:1", "cut", 6)), held=held))
    assert {name: split[name] for name in own} == own
    assert split["email:1"] == own["user_id:u"]


# -- nothing lost or counted twice -------------------------------------------------------------------------------------

USERS, CONTACTS, DEVICES = ["user_id:u", "user_id:v", "user_id:w"], ["email:1", "phone:5"], ["anonymous_id:a", "anonymous_id:b"]
SOMEBODY = st.sampled_from([*USERS, *CONTACTS, *DEVICES])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("event"), st.sampled_from([*USERS, None]), st.sampled_from(DEVICES)),
        st.tuples(st.just("event"), st.sampled_from(USERS), st.sampled_from([*CONTACTS, None])),
        st.tuples(st.just("merge"), SOMEBODY, SOMEBODY),
        st.tuples(st.just("unmerge"), SOMEBODY, SOMEBODY),
    ).filter(lambda step: step[1] != step[2]),
    min_size=4,
    max_size=16,
)


def row(names: tuple[str | None, ...], hour: int) -> tuple:
    told = dict(name.split(":") for name in names if name)
    contact = {kind: f"{kind}:{told[kind]}" for kind in ("email", "phone") if kind in told}
    return (told.get("anonymous_id"), told.get("user_id"), contact.get("email"), contact.get("phone"), hour)


@settings(max_examples=40)
@given(STEPS)
def test_after_any_merges_and_splits_people_and_their_events_are_as_if_the_undone_links_had_never_been(steps: list[tuple]) -> None:
    seen: list[tuple[tuple[str | None, str | None], int]] = []
    merged: dict[frozenset[str], int] = {}
    cut: dict[frozenset[str], int] = {}
    held = None
    for hour, (step, one, other) in enumerate(steps):
        if step == "event":
            seen.append(((one, other), hour))
        elif step == "merge":
            merged[frozenset((one, other))] = hour
            cut.pop(frozenset((one, other)), None)
        else:
            merged.pop(frozenset((one, other)), None)
            cut[frozenset((one, other))] = hour
        if seen:
            joined = edges(
                *((*pair, "link", since) for pair, since in merged.items()), *((*pair, "cut", since) for pair, since in cut.items())
            )
            held = identity.resolve(calls(*(row(names, since) for names, since in seen)), edges=joined, held=held)
    if held is None:
        return
    apart = [(part, since) for names, since in seen for part in ([(names[0],), (names[1],)] if frozenset(names) in cut else [names])]
    never = calls(*(row(names, since) for names, since in apart if any(names)))
    other_world = identity.resolve(never, edges=edges(*((*pair, "link", since) for pair, since in merged.items())))
    pd.testing.assert_frame_equal(held, other_world)
    asked = calls(*(row(names, since) for names, since in seen))[["user_id", "anonymous_id", "event_timestamp"]]
    assert None not in owners(asked, held)  # one owner each: `owners` has a row per event


def test_people_merged_by_new_links_are_renamed_to_the_older_one() -> None:
    before = links((None, "u", None, 0), (None, "v", None, 1), (None, "w", None, 2))
    after = pd.concat([before, links((None, "u", "email:1", 5), (None, "v", "email:1", 6))])
    with connect() as db:
        db.register("old", identity.resolve(before))
        db.register("new", identity.resolve(after))
        renamed = db.sql(identity.renamed_sql("old", "new")).fetchall()
    names = customers((None, "u", None, 0), (None, "v", None, 1))
    assert renamed == [(names["user_id:v"], names["user_id:u"], at(6))]
