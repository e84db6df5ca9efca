import itertools
import json
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipelines.errors import InputError, StoreError
from pipelines.simulate import END, Knobs, Shop, draws, people, simulate, visits, walk
from pipelines.simulate import catalogue as goods
from pipelines.simulate import truth as truths
from pipelines.simulate.truth import Truth

SIZE = {"customers": 250, "days": 84, "seed": 11}
START = END - timedelta(days=SIZE["days"])
BROWSER = ("Product Viewed", "Products Searched", "Product Added", "Product Removed")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("shop"), **SIZE)


@pytest.fixture(scope="module")
def log(shop):
    return well_formed(shop.folder)


def parsed(folder):
    """(line, object or None where it is not JSON) of the whole log."""
    for line in (folder / "events.jsonl").read_text().splitlines():
        try:
            yield line, json.loads(line)
        except json.JSONDecodeError:
            yield line, None


def is_well_formed(message):
    try:
        datetime.fromisoformat(message["timestamp"])
    except (KeyError, ValueError):
        return False
    named = message["type"] == "identify" or (message["type"] == "track" and "event" in message)
    counted = message.get("properties", {}).get("quantity", 1) > 0
    return named and counted and "messageId" in message and ("anonymousId" in message or "userId" in message)


def well_formed(folder):
    """The messages of the log, each once, as a frame with a resolved `user`."""
    found = {m["messageId"]: m for _, m in reversed(list(parsed(folder))) if m is not None and is_well_formed(m)}
    frame = pd.DataFrame(
        {
            "id": list(found),
            "name": [m.get("event", m["type"]) for m in found.values()],
            "device": [m.get("anonymousId") for m in found.values()],
            "user": [m.get("userId") for m in found.values()],
            "at": pd.to_datetime([m["timestamp"] for m in found.values()]),
            "received": pd.to_datetime([m["receivedAt"] for m in found.values()]),
            "properties": [m.get("properties", m.get("traits")) for m in found.values()],
            "allowed": [m["context"]["consent"]["categoryPreferences"]["personalization"] for m in found.values()],
        }
    )
    users = frame[frame["device"].notna()].groupby("device")["user"].first()
    return frame.assign(owner=frame["user"].fillna(frame["device"].map(users))).sort_values(["owner", "at"], ignore_index=True)


def run(folder, **knobs):
    simulate(folder, **SIZE, knobs=Knobs(**knobs))
    return well_formed(folder), Truth.load(folder / "truth.parquet")


# -- reproducible ------------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(shop, tmp_path):
    simulate(tmp_path / "again", **SIZE)
    simulate(tmp_path / "other", **{**SIZE, "seed": 12})
    for name in ("events.jsonl", "items.jsonl", "truth.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (shop.folder / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (shop.folder / name).read_bytes()


def test_more_customers_do_not_change_the_old_ones(shop, log, tmp_path):
    simulate(tmp_path, **{**SIZE, "customers": 400})
    small, large = (Truth.load(folder / "truth.parquet").people for folder in (shop.folder, tmp_path))
    pd.testing.assert_frame_equal(large.loc[small.index], small)
    lines = set((shop.folder / "events.jsonl").read_text().splitlines())
    assert lines < set((tmp_path / "events.jsonl").read_text().splitlines())
    assert (shop.folder / "items.jsonl").read_bytes() == (tmp_path / "items.jsonl").read_bytes()


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(0, 2**40), st.integers(0, 1000))
def test_a_draw_depends_on_its_address_alone(seed, entity, counter):
    alone = draws.uniform(draws.keys(seed, "a stream", np.array([entity])), counter)
    among = draws.uniform(draws.keys(seed, "a stream", entity + np.arange(5)), counter)
    assert 0 < alone[0] < 1
    assert alone[0] == among[0]
    assert alone[0] != draws.uniform(draws.keys(seed, "another stream", np.array([entity])), counter)[0]


def test_draws_are_uniform_and_independent_of_their_neighbours():
    key = draws.keys(3, "x", np.arange(20_000))
    first, second = draws.uniform(key, 0), draws.uniform(key, 1)
    child = draws.uniform(draws.children(key, 0))
    assert stats.kstest(first, "uniform").pvalue > 0.001
    for a, b in itertools.combinations((first, second, child), 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.03


# -- the laws ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(0, 84 * 86_400_000), st.integers(1, 5))
def test_a_week_is_seven_shop_days_wherever_it_starts_and_the_clock_turns_back(offset, weeks):
    laws = Shop(**SIZE)
    at = np.array([laws.start_ms + offset])
    assert laws.shop_days(at + weeks * 7 * 86_400_000) - laws.shop_days(at) == pytest.approx(7 * weeks)
    assert abs(laws.instant_ms(laws.shop_days(at)) - at) <= 1
    assert laws.shop_days(at + 3_600_000) > laws.shop_days(at)


def test_the_chance_of_a_purchase_ahead_is_the_share_of_walks_that_buy():
    laws, n = Shop(**SIZE), 20_000
    assert np.allclose(laws.walks.sum(axis=-1), 1)
    assert ((laws.walks[:, 0] > 0) == (laws.walks[:, 1] > 0)).all()  # no event proves the kind of session
    key = draws.keys(1, "walks", np.arange(n))
    for kind in (0, 1):
        session, _, event, _ = visits.walk(laws, key, np.full(n, bool(kind)), np.full(n, laws.start_ms))
        bought = len(np.unique(session[event == walk.PURCHASE])) / n
        expected = laws.hits[0, kind, walk.START]
        assert abs(bought - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
        assert abs(bought - laws.hits[0, 1 - kind, walk.START]) > 0.2  # control: the other kind's chance is far off


def test_visits_come_at_the_customers_rate_while_they_stay():
    laws = Shop(customers=20_000, days=84, seed=1)
    folk = people.draw(laws)
    person, _, at = visits._starts(laws, folk)
    span = np.minimum(folk.departure, laws.length) - folk.arrival
    expected = folk.visit_rate * span + ~folk.is_old
    seen = np.bincount(person, minlength=laws.customers)
    assert seen.sum() == pytest.approx(expected.sum(), abs=4 * np.sqrt(expected.sum()))
    for group in range(4):
        inside = folk.region == group
        assert seen[inside].sum() == pytest.approx(expected[inside].sum(), abs=4 * np.sqrt(expected[inside].sum()))
    assert laws.start_ms <= at.min() <= at.max() <= laws.end_ms
    assert (laws.shop_days(at) <= folk.departure[person] + 1e-6).all()


def test_views_follow_the_softmax_over_what_is_on_offer():
    laws = Shop(customers=1, days=84, seed=1, items=12)
    folk, items = people.draw(laws), goods.draw(laws)
    n, offered = 40_000, 9
    at = np.full(n, items.available_ms[offered - 1])
    chosen = goods.choose(laws, items, folk, np.zeros(n, dtype=int), at, draws.uniform(draws.keys(1, "v", np.arange(n))))
    utility = (
        np.append(folk.taste[0], folk.price_sensitivity[0]) @ goods.attributes(laws, items.embedding, items.relative_price, is_late=False).T
    )
    share = np.exp(utility + items.quality) * (np.arange(12) < offered)
    expected = n * share / share.sum()
    counts = np.bincount(chosen, minlength=12)
    assert stats.chisquare(counts[:offered], expected[:offered]).pvalue > 0.001
    assert counts[offered:].sum() == 0


# -- the log -----------------------------------------------------------------------------------------------------------


def test_planted_dirt_is_counted_as_it_lies_in_the_file(shop):
    lines = list(parsed(shop.folder))
    good = [m for _, m in lines if m is not None and is_well_formed(m)]
    ids = Counter(m["messageId"] for m in good)
    assert len(lines) == shop.lines == shop.events + shop.duplicates + shop.malformed
    assert len(ids) == shop.events
    assert sum(ids.values()) - len(ids) == shop.duplicates
    assert sum(m is None for _, m in lines) == shop.malformed_by_kind["broken_json"] > 0
    assert len(lines) - len(good) == shop.malformed == sum(shop.malformed_by_kind.values())
    assert all(shop.malformed_by_kind.values())
    first = {}
    for m in good:
        first.setdefault(m["messageId"], m)
    delays = [datetime.fromisoformat(m["receivedAt"]) - datetime.fromisoformat(m["timestamp"]) for m in first.values()]
    assert sum(delay >= timedelta(hours=1) for delay in delays) == shop.late
    for part, share in ((shop.duplicates, 0.01), (shop.late, 0.01), (shop.malformed, 0.005)):
        assert 0.6 * share < part / shop.events < 1.4 * share
    assert Counter(m.get("event", m["type"]) for m in first.values()) == shop.events_by_name


def test_a_repeated_message_is_the_same_but_for_its_arrival(shop):
    seen, repeated = {}, 0
    for _, m in parsed(shop.folder):
        if m is None or not is_well_formed(m):
            continue
        before = seen.setdefault(m["messageId"], m)
        if before is not m:
            repeated += 1
            assert {**m, "receivedAt": 0} == {**before, "receivedAt": 0}
            assert m["receivedAt"] > before["receivedAt"]
    assert repeated == shop.duplicates


def test_lines_are_in_order_of_arrival_and_nothing_arrives_before_it_happened(shop, log):
    arrivals = [m["receivedAt"] for _, m in parsed(shop.folder) if m is not None]
    assert arrivals == sorted(arrivals)
    assert (log["received"] > log["at"]).all()
    assert log["at"].min() >= START
    assert log["received"].max() <= END
    assert (shop.first_event, shop.last_event) == (log["at"].min().to_pydatetime(), log["at"].max().to_pydatetime())


def test_every_device_belongs_to_one_person_and_says_so(log):
    owners = log[log["device"].notna() & log["user"].notna()].groupby("device")["user"].nunique()
    assert (owners == 1).all()
    signed = log[log["name"] == "identify"]
    assert signed["device"].is_unique
    anonymous = log[log["user"].isna()]
    assert 0.02 < len(anonymous) / len(log) < 0.3  # control: there is something to link
    assert (anonymous["at"] < anonymous["device"].map(signed.set_index("device")["at"]).fillna(END + timedelta(days=1))).all()
    assert 1 < signed.groupby("user").size().mean() < 2
    assert set(signed["properties"].iloc[0]) == {"email", "age_band", "gender", "region"}


def test_traits_are_those_of_the_truth(shop, log):
    people_ = Truth.load(shop.folder / "truth.parquet").people
    for row in log[log["name"] == "identify"].itertuples():
        assert {k: v for k, v in row.properties.items() if k != "email"} == people_.loc[
            row.user, ["age_band", "gender", "region"]
        ].to_dict()


def test_carts_are_bought_as_they_were_filled(log):
    checked = 0
    for _, session in visits_of(log):
        cart = []
        for row in session.itertuples():
            if row.name == "Product Added":
                cart.append((row.properties["product_id"], row.properties["quantity"]))
            elif row.name == "Product Removed":
                assert cart.pop() == (row.properties["product_id"], row.properties["quantity"])
            elif row.name == "Order Completed":
                bought = Counter()
                for item, quantity in cart:
                    bought[item] += quantity
                assert {p["product_id"]: p["quantity"] for p in row.properties["products"]} == bought
                total = sum(p["price"] * p["quantity"] for p in row.properties["products"])
                assert row.properties["total"] == pytest.approx(total)
                cart, checked = [], checked + 1
    assert checked > 50


def visits_of(log):
    acts = log[log["name"].isin((*BROWSER, "Order Completed"))]
    opens = (acts["owner"] != acts["owner"].shift()) | (acts["at"].diff() > pd.Timedelta(30, "min"))
    return acts.groupby(opens.cumsum().to_numpy())


def test_sessions_are_far_apart_and_their_events_close(log):
    acts = log[log["name"].isin((*BROWSER, "Order Completed"))]
    gaps = acts.groupby("owner")["at"].diff().dropna()
    assert not gaps.between(pd.Timedelta(11, "min"), pd.Timedelta(30, "min")).any()
    assert gaps.min() >= pd.Timedelta(2, "s")


def test_refunds_name_an_order_of_the_same_customer_and_come_later(log):
    orders = log[log["name"] == "Order Completed"].assign(order=lambda f: f["properties"].map(lambda p: p["order_id"])).set_index("order")
    refunds = log[log["name"] == "Order Refunded"]
    known = [row for row in refunds.itertuples() if row.properties["order_id"] in orders.index]
    assert len(known) > 5
    for row in known:
        order = orders.loc[row.properties["order_id"]]
        assert order["user"] == row.user
        assert pd.Timedelta(2, "D") <= row.at - order["at"] <= pd.Timedelta(14, "D")
        assert row.properties["products"][0] in order["properties"]["products"]
        assert row.device is None


def test_prices_are_the_catalogues_and_new_items_are_not_seen_before_they_come(shop, log):
    items = pd.read_json(shop.folder / "items.jsonl", lines=True, convert_dates=["available_from"]).set_index("item_id")
    assert list(items.columns) == ["category", "price", "available_from"]
    assert 0.1 < (items["available_from"] > START).mean() < 0.4
    views = log[log["name"] == "Product Viewed"]
    item = views["properties"].map(lambda p: p["product_id"])
    assert (views["at"].to_numpy() >= items.loc[item, "available_from"].to_numpy()).all()
    assert views["properties"].map(lambda p: p["price"]).to_numpy() == pytest.approx(items.loc[item, "price"].to_numpy())
    counts = item.value_counts()
    assert counts.iloc[:40].sum() / counts.sum() > 0.3  # popular items: a tenth of them has a third of the views


def test_consent_is_said_on_every_message_and_a_withdrawal_ends_it(tmp_path):
    report = simulate(tmp_path, customers=1_500, days=28, seed=2)
    log, folk = well_formed(tmp_path), Truth.load(tmp_path / "truth.parquet").people
    granted = log["owner"].map(folk["grants"]).astype(bool)
    withdrawn_at = log["owner"].map(folk["withdrawn_at"])
    assert (log["allowed"] == (granted & ~(log["at"] >= withdrawn_at))).all()
    assert report.never_granted == (~folk["grants"]).sum()
    assert 0.02 < report.never_granted / 1_500 < 0.06
    assert report.withdrawn == folk["withdrawn_at"].notna().sum() > 0
    told = log[(log["name"] == "Consent Updated") & ~log["allowed"]].groupby("owner")["at"].min()
    left = folk["withdrawn_at"].dropna()
    assert (told.reindex(left.index).dropna() == left.reindex(told.index).dropna()).all()


# -- the knobs ---------------------------------------------------------------------------------------------------------


def test_knobs_at_zero_change_nothing(shop, tmp_path):
    idle = Knobs(drift="concept", strength=0.0, onset_day=10, bias=0.0, bias_group="region:west", treatment_effect=0.0)
    simulate(tmp_path, **SIZE, knobs=idle)
    for name in ("events.jsonl", "items.jsonl"):
        assert (tmp_path / name).read_bytes() == (shop.folder / name).read_bytes()
    assert Truth.load(tmp_path / "truth.parquet").shop.knobs == idle


def test_bias_hides_browser_events_of_one_group_and_nothing_else(log, tmp_path):
    biased, truth = run(tmp_path, bias=0.5, bias_group="gender:male")
    in_group = log["owner"].map(truth.people["gender"]) == "male"
    seen = log["id"].isin(biased["id"])
    browser = log["name"].isin(BROWSER)
    assert abs(seen[in_group & browser].mean() - 0.5) < 0.05
    assert seen[~(in_group & browser)].all()
    assert set(biased["id"]) < set(log["id"])


def test_covariate_drift_raises_prices_and_moves_newcomers_but_not_what_people_do(log, tmp_path):
    onset = START + timedelta(days=42)
    drifted, truth = run(tmp_path, drift="covariate", strength=0.6, onset_day=42)
    before = Truth.load(tmp_path / "truth.parquet")  # loads twice, the same
    pd.testing.assert_frame_equal(before.people, truth.people)
    late = truth.people["arrival"] >= onset
    west = truth.people["region"] == "west"
    assert west[late].mean() > 0.4 > 0.25 > west[~late].mean()
    unmoved = log[~log["owner"].isin(truth.people.index[late])]
    same = unmoved.merge(drifted, on="id", how="left", suffixes=("", "_new"))
    assert (same["at"] == same["at_new"]).all()
    views = same[same["name"] == "Product Viewed"]
    assert (views["properties"].map(lambda p: p["product_id"]) == views["properties_new"].map(lambda p: p["product_id"])).all()
    ratio = views["properties_new"].map(lambda p: p["price"]) / views["properties"].map(lambda p: p["price"])
    assert ratio[views["at"] >= onset].to_numpy() == pytest.approx(1.6, abs=0.01)
    assert (ratio[views["at"] < onset] == 1).all()


def orders_per_visit(log, since, until):
    acts = log[(log["at"] >= since) & (log["at"] < until)]
    sessions = sum(1 for _ in visits_of(acts))
    return (acts["name"] == "Order Completed").sum() / sessions


@pytest.mark.parametrize("drift", ["concept", "prior"])
def test_concept_and_prior_drift_cut_orders_from_the_onset_on_and_not_before(drift, log, tmp_path):
    onset = START + timedelta(days=42)
    drifted, _ = run(tmp_path, drift=drift, strength=0.8, onset_day=42)
    old = log[log["at"] < onset]
    pd.testing.assert_frame_equal(drifted[drifted["id"].isin(old["id"])].reset_index(drop=True), old.reset_index(drop=True))
    assert orders_per_visit(drifted, onset, END) < 0.65 * orders_per_visit(log, onset, END)


def test_concept_drift_turns_tastes_and_prior_drift_does_not():
    laws = Shop(**SIZE, knobs=Knobs(drift="concept", strength=1.0, onset_day=1))
    plain = replace(laws, knobs=Knobs(drift="prior", strength=1.0, onset_day=1))
    items, folk = goods.draw(laws), people.draw(laws)
    for shop_, same in ((plain, True), (laws, False)):
        early, late = (goods.attributes(shop_, items.embedding, items.relative_price, is_late=when)[:, :-1] for when in (False, True))
        likes = np.corrcoef((folk.taste @ early.T).ravel(), (folk.taste @ late.T).ravel())[0, 1]
        assert bool(likes > 0.99) is same
        assert np.linalg.norm(early) == pytest.approx(np.linalg.norm(late))


def test_an_outage_loses_its_share_of_events_for_a_week(log, tmp_path):
    broken, _ = run(tmp_path, drift="outage", strength=0.7, onset_day=42)
    out = log["at"].between(START + timedelta(days=42), START + timedelta(days=49), inclusive="left")
    out &= log["name"].isin((*BROWSER, "Order Completed"))
    seen = log["id"].isin(broken["id"])
    assert abs(seen[out].mean() - 0.3) < 0.06
    assert seen[~out].all()


def test_an_experiment_exposes_by_chance_and_treatment_raises_orders_as_the_truth_says(tmp_path):
    simulate(tmp_path, customers=600, days=84, seed=4, knobs=Knobs(treatment_effect=0.4, experiment_day=28))
    log, truth = well_formed(tmp_path), Truth.load(tmp_path / "truth.parquet")
    since = START + timedelta(days=28)
    shown = log[log["name"] == "Experiment Viewed"]
    assert shown["at"].min() >= since
    variant = shown["properties"].map(lambda p: p["variant"])
    assert ((variant == "treatment") == shown["owner"].map(truth.people["is_treated"]).astype(bool)).all()
    assert set(shown["properties"].map(lambda p: p["propensity"])) == {0.5}
    assert abs(truth.people["is_treated"].mean() - 0.5) < 0.06
    orders = (
        log[(log["name"] == "Order Completed") & (log["at"] >= since)].groupby("owner").size().reindex(truth.people.index, fill_value=0)
    )
    own = truth.people["orders_treated"].where(truth.people["is_treated"], truth.people["orders_control"])
    other = truth.people["orders_control"].where(truth.people["is_treated"], truth.people["orders_treated"])
    assert (orders == own).mean() > 0.97  # the rest are late or cut by the end of the log
    assert (orders == other).mean() < 0.9  # control
    lift = (truth.people["orders_treated"] - truth.people["orders_control"]).groupby(truth.people["region"]).mean()
    assert lift["east"] > lift["north"] > lift["west"] >= 0
    assert (truth.people["purchase_treated"] > truth.people["purchase_control"]).all()


def test_an_experiment_without_effect_shows_but_changes_no_behaviour(log, tmp_path):
    tried, truth = run(tmp_path, experiment_day=42)
    assert (tried["name"] == "Experiment Viewed").any()
    assert set(tried.loc[tried["name"] != "Experiment Viewed", "id"]) == set(log["id"])
    assert (truth.people["orders_treated"] == truth.people["orders_control"]).all()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"drift": "sideways", "onset_day": 3}, "drift is one of none, covariate"),
        ({"drift": "prior", "strength": 1.5, "onset_day": 3}, "strength lies between 0 and 1; found 1.5"),
        ({"drift": "prior", "strength": 0.5}, "a drift and its onset_day come together"),
        ({"onset_day": 3}, "a drift and its onset_day come together"),
        ({"strength": 0.5}, "strength 0.5 needs a drift"),
        ({"bias": -0.1}, "bias lies between 0 and 1"),
        ({"bias": float("nan")}, "bias lies between 0 and 1"),
        ({"bias": 0.5, "bias_group": "gender:martian"}, "bias_group is one of region:north"),
        ({"treatment_effect": 2}, "treatment_effect lies between 0 and 1"),
        ({"experiment_day": -1}, "experiment_day counts days"),
    ],
)
def test_impossible_knobs_are_refused_with_a_sentence(knobs, says):
    with pytest.raises(InputError, match=says):
        Knobs(**knobs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"customers": 0}, "customers must be 1 or more; found 0"),
        ({"days": 3}, "days must be 14 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"items": 1}, "items must be 2 or more"),
        ({"knobs": Knobs(drift="prior", strength=0.5, onset_day=500)}, "onset_day must lie within the 84 days"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_written(change, says, tmp_path):
    with pytest.raises(InputError, match=says):
        simulate(tmp_path / "out", **{**SIZE, **change})
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("here first")
    with pytest.raises(StoreError, match="could not be written"):
        simulate(tmp_path / "file" / "shop", customers=5, days=14, seed=1)


def test_a_failed_write_leaves_the_old_shop_whole(tmp_path, monkeypatch):
    simulate(tmp_path, customers=5, days=14, seed=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(truths, "write", full)
    with pytest.raises(StoreError, match="No space left on device"):
        simulate(tmp_path, customers=5, days=14, seed=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_is_no_truth_is_refused(tmp_path):
    (tmp_path / "truth.parquet").write_text("hello")
    with pytest.raises(InputError, match=r"expected the truth\.parquet"):
        Truth.load(tmp_path / "truth.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="was not written by this version"):
        Truth.load(tmp_path / "other.parquet")


def test_a_shop_of_one_customer_is_a_shop(tmp_path):
    for seed in range(3):  # some of them never come
        report = simulate(tmp_path / str(seed), customers=1, days=14, seed=seed)
        assert report.events == len(well_formed(report.folder)) if report.events else report.first_event is None
