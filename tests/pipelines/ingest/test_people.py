import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines import identity, tables
from pipelines.ingest import reassign

WHO = st.tuples(
    st.sampled_from([None, "u1", "u2", "u3"]), st.sampled_from([None, "a1", "a2"]), st.booleans(), st.sampled_from([None, "x@y.z", "v@y.z"])
)


def test_a_login_makes_earlier_visits_known_only_from_then_on(shop) -> None:
    shop.run(
        shop.call("m1", 0, user="u1"),
        shop.call("m2", 5, user=None, anonymousId="phone"),
        shop.call("m3", 60, user="u1", anonymousId="phone"),
    )
    created = shop.events().set_index("event_id")["created_timestamp"]
    assert created["m2"] == pd.Timestamp(shop.at(60.1))
    assert created["m1"] == pd.Timestamp(shop.at(0.1))


def test_a_later_file_that_merges_people_renames_them_everywhere(shop) -> None:
    shop.run(shop.call("m1", 0, user="u1"), shop.call("m2", 1, user="u2"))
    assert shop.events()["customer_id"].nunique() == 2
    shop.run(*(shop.call(f"n{i}", 10 + i, user=f"u{i}", properties={"product_id": "i", "email": "same@x.org"}) for i in (1, 2)))
    for table in (tables.EVENTS, tables.IDENTITIES, tables.CONSENTS, tables.CUSTOMER_CONSENT):
        assert shop.table(table)["customer_id"].nunique() == 1, table.name


@settings(max_examples=4, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.lists(WHO, max_size=6), st.lists(WHO, max_size=6))
def test_two_halves_in_order_give_the_tables_of_the_whole(new_shop, first: list, second: list) -> None:
    whole = new_shop()
    parts = new_shop(like=whole)

    def line(place: int, who: tuple) -> dict:
        user, visitor, is_order, email = who
        fields = {"anonymousId": visitor} if visitor else {}
        fields |= {"traits": {"email": email, "region": f"r{place % 3}"}} if email else {}
        return (whole.order if is_order else whole.call)(f"m{place}", place * 20, user=user, **fields)

    halves = [("u1", None, False, None), *first], [("u2", "a1", True, None), *second]
    lines = [line(place, who) for place, who in enumerate(halves[0] + halves[1])]
    whole.run(*lines)
    parts.run(*lines[: len(halves[0])])
    parts.run(*lines[len(halves[0]) :])
    for table in whole.clean:
        pd.testing.assert_frame_equal(whole.table(table), parts.table(table), obj=table.name)


# -- people who are joined and told apart ------------------------------------------------------------------------------


def decide(shop, one: str, other: str, state: str, minutes: float) -> None:
    """Write the edge between two user ids, in the place of what was decided before."""
    left, right = sorted(shop.name("user_id", name) for name in (one, other))
    held = shop.table(tables.IDENTITY_EDGES)
    edge = pd.DataFrame(
        [{"link_id": identity.link_id(left, right), "left": left, "right": right, "kind": "manual", "state": state, "weight": 1.0,
          "evidence": "{}", "decided_by": "tests", "created_timestamp": pd.Timestamp(shop.at(minutes))}]
    )  # fmt: skip
    kept = held[held["link_id"] != edge["link_id"][0]]
    tables.write(shop.home, tables.IDENTITY_EDGES, pd.concat([kept, edge]) if len(kept) else edge)
    reassign(shop.home, settings=shop.settings)


def identify(shop, message: str, minutes: float, user: str, region: str, **fields: object) -> dict:
    return shop.call(message, minutes, user=user, type="identify", traits={"region": region}, **fields)


def test_two_people_that_are_linked_become_one_and_a_cut_gives_each_their_own_back(shop) -> None:
    shop.run(
        identify(shop, "m1", 0, "u1", "north"), shop.call("m2", 1, user="u1"), identify(shop, "m3", 2, "u2", "south"),
        shop.call("m4", 3, user="u2", context=shop.refused), shop.call("m5", 4, user="u2"),
    )  # fmt: skip
    apart = {table.name: shop.table(table) for table in shop.clean}
    assert shop.events()["customer_id"].nunique() == 2
    decide(shop, "u1", "u2", "link", 10)
    for table in (tables.EVENTS, tables.IDENTITIES, tables.CONSENTS, tables.CUSTOMER_CONSENT, tables.CUSTOMER_PROFILE):
        assert shop.table(table)["customer_id"].nunique() == 1, table.name
    assert len(shop.events()) == 4
    decide(shop, "u1", "u2", "cut", 20)
    for table in (tables.EVENTS, tables.TRAITS, tables.IDENTITIES):
        now, then = (frame.drop(columns=["created_timestamp"]) for frame in (shop.table(table), apart[table.name]))
        pd.testing.assert_frame_equal(now, then, obj=table.name)
    pd.testing.assert_frame_equal(changes_of_word(shop.table(tables.CONSENTS)), changes_of_word(apart["consents"]))
    assert shop.is_balanced()


def changes_of_word(consents: pd.DataFrame) -> pd.DataFrame:
    """The rows at which an identifier said something else than before; others may stand between them."""
    key = ["customer_id", "identifier", "purpose"]
    ordered = consents.sort_values([*key, "event_timestamp"])
    is_change = ordered["is_allowed"] != ordered.groupby(key)["is_allowed"].shift()
    return ordered[is_change][[*key, "is_allowed", "event_timestamp"]].reset_index(drop=True)


STEP = st.tuples(st.sampled_from(["event", "event", "link", "cut"]), st.integers(0, 2), st.integers(0, 2), st.booleans())


@pytest.mark.slow
@settings(
    max_examples=4,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(STEP, min_size=3, max_size=7))
def test_nothing_is_lost_or_counted_twice_in_any_sequence_of_merges_splits_and_events(new_shop, steps: list[tuple]) -> None:
    shop = new_shop()
    shop.run(*(identify(shop, f"first-{n}", n, f"u{n}", f"r{n}") for n in range(3)), name="first.jsonl")
    sent = {f"first-{n}": f"u{n}" for n in range(3)}
    for number, (what, one, other, is_device) in enumerate(steps):
        if what == "event":
            device = {"anonymousId": f"d{other}"} if is_device else {}
            shop.run(identify(shop, f"m{number}", 10 + number, f"u{one}", f"r{number}", **device), name=f"{number}.jsonl")
            sent[f"m{number}"] = f"u{one}"
        elif one != other:
            decide(shop, f"u{one}", f"u{other}", what, 10 + number)
        events = shop.events().set_index("event_id")
        owner = shop.table(tables.IDENTITIES).set_index("identifier")["customer_id"]
        assert sorted(events.index) == sorted(sent)
        assert {event: owner[shop.name("user_id", user)] for event, user in sent.items()} == events["customer_id"].to_dict()
        words = shop.table(tables.TRAITS)
        assert sorted(words["value"]) == sorted(f"r{name.removeprefix('first-').removeprefix('m')}" for name in sent)
        said = shop.table(tables.CONSENTS)
        is_known = said["identifier"].str.startswith("user_id:")
        assert (said[is_known]["identifier"].map(owner) == said[is_known]["customer_id"]).all()
        assert shop.is_balanced()


def test_a_device_that_people_share_is_by_turns_theirs(shop) -> None:
    shop.run(
        shop.call("m1", 0, user=None, anonymousId="d"), shop.call("m2", 1, user="u1", anonymousId="d"),
        shop.call("m3", 2, user=None, anonymousId="d"), shop.call("m4", 3, user="u2", anonymousId="d"),
        shop.call("m5", 4, user=None, anonymousId="d"), shop.call("m0", -1, user="u2"),
    )  # fmt: skip
    owner = shop.events().set_index("event_id")["customer_id"]
    assert owner["m1"] == owner["m2"] == owner["m3"] != owner["m4"]
    assert owner["m4"] == owner["m5"] == owner["m0"]


def test_a_phone_number_joins_what_it_was_given_with(shop) -> None:
    shop.run(
        shop.call("m1", 0, user="u1", traits={"phone": "+49 151 2345678"}),
        shop.call("m2", 1, user=None, properties={"product_id": "i", "phone": "0049-151-2345678"}),
        shop.call("m3", 2, user="u2"),
    )
    events = shop.events().set_index("event_id")
    assert events["customer_id"]["m1"] == events["customer_id"]["m2"] != events["customer_id"]["m3"]
    assert events["user_id"]["m2"] == shop.name("phone", "+491512345678")
