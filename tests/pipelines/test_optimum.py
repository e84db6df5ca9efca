import json
from datetime import timedelta

import duckdb
import numpy as np
import pandas as pd
import pytest
from scipy.special import logsumexp
from scipy.stats import beta, gamma
from sklearn.metrics import roc_auc_score

from pipelines import optimum
from pipelines.optimum import Truth, churn_probability, intent_probability, item_scores, taste
from pipelines.optimum.histories import histories, last_sessions
from pipelines.simulate import END, Knobs, simulate

HORIZON = 28
TYPES = {
    "Product Viewed": "view",
    "Products Searched": "search",
    "Product Added": "cart_add",
    "Product Removed": "cart_remove",
    "Order Completed": "purchase",
    "Order Refunded": "return",
}
ACTS = ("view", "search", "cart_add", "cart_remove", "purchase")


class World:
    """A simulated shop as an ingestion would leave it: events, identities, truth."""

    def __init__(self, folder, **size):
        simulate(folder, **size)
        self.truth = Truth.load(folder / "truth.parquet")
        self.events = clean_events(folder / "events.jsonl")
        customers = self.events["customer_id"].drop_duplicates()
        self.identities = pd.DataFrame({"identifier": "user_id:" + customers.str[1:], "customer_id": customers})

    def churn(self, rows, events=None, **change):
        options = {"horizon_days": HORIZON, "gap_days": 0, "identities": self.identities, **change}
        return churn_probability(self.truth, self.events if events is None else events, rows, **options)

    def intent(self, rows, events=None):
        return intent_probability(self.truth, self.events if events is None else events, rows, identities=self.identities)

    def people_of(self, rows):
        return self.truth.people.loc[rows["customer_id"].str[1:]]


def clean_events(path):
    """The well-formed messages, each once, order lines apart; created: when we knew the event and whose it is."""
    query = """
        SELECT j->>'messageId' id, j->>'event' AS name, j->>'type' AS kind, j->>'anonymousId' device, j->>'userId' AS userid,
               try_cast(j->>'timestamp' AS TIMESTAMPTZ) AS happened, try_cast(j->>'receivedAt' AS TIMESTAMPTZ) AS received,
               j->>'$.properties.product_id' item, j->'$.properties.products' products,
               coalesce(try_cast(j->>'$.properties.quantity' AS BIGINT), 1) quantity,
               (j->>'$.context.consent.categoryPreferences.personalization') = 'true' allowed
        FROM (SELECT try_cast(line AS JSON) j
              FROM read_csv(?, header=false, columns={'line': 'VARCHAR'}, delim='\x01', quote='', escape='', auto_detect=false))
        WHERE j IS NOT NULL"""
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        rows = connection.execute(query, [str(path)]).df()
    rows = rows[rows["id"].notna() & rows["happened"].notna() & (rows["quantity"] > 0) & rows["kind"].isin(["track", "identify"])]
    rows = rows[rows["device"].notna() | rows["userid"].notna()].drop_duplicates("id")
    links = rows[rows["kind"] == "identify"].groupby("device").agg(owner=("userid", "first"), linked=("received", "min"))
    rows = rows.join(links, on="device")
    rows["owner"] = rows["owner"].fillna(rows["userid"])
    rows = rows[rows["allowed"] & rows["owner"].notna() & rows["name"].isin(TYPES)]
    lines = rows["products"].map(json.loads, na_action="ignore").explode()
    rows = rows.drop(columns="products").join(lines)
    return pd.DataFrame(
        {
            "customer_id": "c" + rows["owner"],
            "type": rows["name"].map(TYPES),
            "item_id": rows["products"].map(lambda line: line["product_id"], na_action="ignore").fillna(rows["item"]),
            "event_timestamp": rows["happened"].dt.as_unit("us"),
            "created_timestamp": rows[["received", "linked"]].max(axis=1).dt.as_unit("us"),
        }
    ).sort_values(["customer_id", "event_timestamp"], kind="stable", ignore_index=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("shop"), customers=1_200, days=182, seed=7)


@pytest.fixture(scope="module")
def churn_rows(world):
    """Customers with an order in the 84 days before each of three cut-offs, and whether none follows in the horizon."""
    orders = world.events[world.events["type"] == "purchase"]
    parts = []
    for back in (1, 2, 3):
        cut = pd.Timestamp(END) - timedelta(days=HORIZON * back)
        recent = orders[(orders["event_timestamp"] <= cut) & (orders["event_timestamp"] > cut - timedelta(days=84))]
        later = orders[(orders["event_timestamp"] > cut) & (orders["event_timestamp"] <= cut + timedelta(days=HORIZON))]
        last = recent.groupby("customer_id")["event_timestamp"].max()
        part = pd.DataFrame({"customer_id": last.index, "event_timestamp": cut, "silence": (cut - last).dt.total_seconds().to_numpy()})
        parts.append(part.assign(label=~part["customer_id"].isin(later["customer_id"])))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def intent_rows(world):
    rows = decision_points(world.events)
    return rows.assign(score=world.intent(rows))


def decision_points(events):
    """After the 1st, 3rd and 6th event of a session, before its first order; label: an order follows."""
    acts = events[events["type"].isin(ACTS)].drop_duplicates(["customer_id", "event_timestamp", "type"])
    opens = (acts["customer_id"] != acts["customer_id"].shift()) | (acts["event_timestamp"].diff() > pd.Timedelta(30, "min"))
    session = acts.groupby(opens.cumsum().to_numpy())
    known = acts[["event_timestamp", "created_timestamp"]].max(axis=1)
    knew = known.groupby(opens.cumsum().to_numpy()).cummax() + pd.Timedelta(1, "us")
    is_order = (acts["type"] == "purchase").astype(int)
    bought = is_order.groupby(opens.cumsum().to_numpy())
    rows = acts.assign(
        n=session.cumcount() + 1,
        before=bought.cumsum(),
        label=bought.transform("sum") > bought.cumsum(),
        in_cart=(acts["type"] == "cart_add").astype(int).groupby(opens.cumsum().to_numpy()).cumsum(),
    )
    rows = rows.assign(lag=knew - rows["event_timestamp"], event_timestamp=knew)
    return rows[rows["n"].isin([1, 3, 6]) & (rows["before"] == 0) & (rows["lag"] < pd.Timedelta(2, "s"))].reset_index(drop=True)


def calibration_error(probability, label, bins=10):
    order = np.argsort(probability, kind="stable")
    parts = zip(np.array_split(np.asarray(probability)[order], bins), np.array_split(np.asarray(label)[order], bins), strict=True)
    return float(np.mean([abs(p.mean() - y.mean()) for p, y in parts]))


def misses(probability, label):
    """How many standard errors the mean prediction lies from the base rate."""
    return abs(np.sum(probability) - np.sum(label)) / np.sqrt(np.sum(probability * (1 - probability)))


# -- churn -------------------------------------------------------------------------------------------------------------


def test_churn_optimum_is_calibrated(world, churn_rows):
    score = world.churn(churn_rows)
    assert 0.35 < churn_rows["label"].mean() < 0.65
    assert misses(score, churn_rows["label"]) < 3
    assert calibration_error(score, churn_rows["label"]) < 0.05
    assert misses(score**1.5, churn_rows["label"]) > 3  # control: the check can fail
    assert calibration_error(score**1.5, churn_rows["label"]) > 0.05


def test_latent_churn_oracle_is_above_the_optimum_and_the_optimum_above_recency(world, churn_rows):
    people = world.people_of(churn_rows)
    here = people["departure"].to_numpy() > churn_rows["event_timestamp"].to_numpy()
    buys, leaves = (people["visit_rate"] * people["purchase_control"]).to_numpy(), people["dropout_rate"].to_numpy()
    oracle = 1 - here * buys / (buys + leaves) * (1 - np.exp(-(buys + leaves) * HORIZON))
    latent, best, rule = (roc_auc_score(churn_rows["label"], s) for s in (oracle, world.churn(churn_rows), churn_rows["silence"]))
    assert latent > best + 0.02 > rule + 0.06
    assert 0.75 < best < 0.9


def test_churn_probability_is_the_posterior_by_brute_force(world):
    """One visit pattern, all hidden quantities on a plain grid, both accounts of where the customer was before."""
    shop, at = world.truth.shop, pd.Timestamp(END) - timedelta(days=40)
    user = world.truth.people.index[world.truth.people["region"] == "north"][0]
    for days_ago in ((100, 90, 61), (20,), (5, 4, 3, 2, 1)):
        times = [at - timedelta(days=d) for d in days_ago]
        events = pd.DataFrame(
            {"customer_id": "cx", "type": "view", "item_id": "i00001", "event_timestamp": times, "created_timestamp": times}
        )
        rows = pd.DataFrame({"customer_id": ["cx"], "event_timestamp": [at]})
        identities = pd.DataFrame({"identifier": [f"user_id:{user}"], "customer_id": ["cx"]})
        options = {"horizon_days": HORIZON, "gap_days": 3, "identities": identities}
        found = churn_probability(world.truth, events, rows, **options)[0]
        assert found == pytest.approx(brute_force(shop, times, at, gap=3), abs=0.004)
        assert found != pytest.approx(brute_force(shop, times, at + timedelta(days=10), gap=3), abs=0.004)  # control


def brute_force(shop, times, at, *, gap):
    n = (np.arange(160) + 0.5) / 160
    rate = gamma.ppf(n, shop.visit_shape, scale=shop.visits_per_day / shop.visit_shape)[:, None, None]
    hazard = gamma.ppf(n, shop.dropout_shape, scale=shop.dropouts_per_day / shop.dropout_shape)[None, :, None]
    mission = beta.ppf(n, shop.mission_alpha, shop.mission_beta)
    days = shop.shop_days(np.array([round(t.timestamp() * 1000) for t in [*times, at, at + timedelta(days=gap)]]))
    first, last, now, opens = days[0], days[-3], days[-2], days[-1]
    walk = shop.walks[0]  # start -> view -> leave, by kind
    likes = [walk[kind, 0, 0] * walk[kind, 1, 5] for kind in (0, 1)]
    weight = (mission * likes[1] + (1 - mission) * likes[0]) ** len(times)
    buys = (shop.hits[0, 1, 0] * mission + shop.hits[0, 0, 0] * (1 - mission))[None, None, :] * rate
    returns = np.exp(-hazard * (opens - now)) * buys / (buys + hazard) * (1 - np.exp(-(buys + hazard) * HORIZON))
    returns = (returns * weight).sum(axis=2) / weight.sum()
    rate, hazard = rate[..., 0], hazard[..., 0]
    logs, alive = [], []
    for x, t, T, prior in ((len(times), last, now, 0.5), (len(times) - 1, last - first, now - first, 0.5 / shop.length)):
        here = x * np.log(rate) - (rate + hazard) * T
        gone = x * np.log(rate) + np.log(hazard / (rate + hazard) * (np.exp(-(rate + hazard) * t) - np.exp(-(rate + hazard) * T)))
        logs.append(np.log(prior) + np.logaddexp(here, gone))
        alive.append(np.exp(here - np.logaddexp(here, gone)))
    posterior = np.exp(np.array(logs) - logsumexp(logs))
    return 1 - (posterior * np.array(alive) * returns).sum()


def test_churn_falls_with_the_horizon_and_rises_with_the_gap(world, churn_rows):
    rows = churn_rows.head(200)
    short, long, gapped = world.churn(rows, horizon_days=14), world.churn(rows), world.churn(rows, horizon_days=14, gap_days=14)
    assert (long < short).all()
    assert (gapped > long - 1e-9).all()
    assert ((short >= 0) & (short <= 1)).all()


# -- intent ------------------------------------------------------------------------------------------------------------


def test_intent_optimum_is_calibrated(world, intent_rows):
    score, label = intent_rows["score"], intent_rows["label"]
    assert 0.10 < label.mean() < 0.25
    assert misses(score, label) < 3.5
    assert calibration_error(score, label) < 0.012
    assert misses(score * 0.9, label) > 3.5  # control
    assert calibration_error(score * 0.85, label) > 0.02


def test_latent_intent_oracle_is_above_the_optimum_and_the_optimum_above_the_cart(world, intent_rows):
    oracle = np.empty(len(intent_rows))
    mission = world.people_of(intent_rows)["mission_probability"].to_numpy()
    for part, known in histories(world.truth, world.events, intent_rows, world.identities):
        last = last_sessions(known)
        odds = np.exp(known.session_log_likelihood[last]) * np.column_stack([1 - mission[part], mission[part]])
        oracle[part] = (odds * world.truth.shop.hits[0, :, known.session_state[last]]).sum(axis=1) / odds.sum(axis=1)
    latent, found, rule = (roc_auc_score(intent_rows["label"], score) for score in (oracle, intent_rows["score"], intent_rows["in_cart"]))
    assert latent > found + 0.01
    assert found > rule + 0.05
    assert 0.75 < found < 0.9


def test_intent_after_the_first_view_of_a_newcomer_is_bayes_by_hand(world):
    shop, at = world.truth.shop, pd.Timestamp(END)
    time = at - pd.Timedelta(1, "s")
    events = pd.DataFrame(
        {"customer_id": ["cx"], "type": ["view"], "item_id": ["i00001"], "event_timestamp": [time], "created_timestamp": [time]}
    )
    rows = pd.DataFrame({"customer_id": ["cx"], "event_timestamp": [at]})
    prior = np.array([shop.mission_beta, shop.mission_alpha]) / (shop.mission_alpha + shop.mission_beta)
    kind = prior * shop.walks[0, :, 0, 0]
    by_hand = kind @ shop.hits[0, :, 1] / kind.sum()
    assert world.intent(rows, events)[0] == pytest.approx(by_hand, abs=1e-6)


def test_intent_fades_with_silence_and_is_gone_when_the_session_is_over(world):
    start = pd.Timestamp(END) - pd.Timedelta(2, "h")
    times = [start, start + pd.Timedelta(20, "s")]
    events = pd.DataFrame(
        {"customer_id": "cx", "type": ["view", "cart_add"], "item_id": "i00001", "event_timestamp": times, "created_timestamp": times}
    )
    rows = pd.DataFrame({"customer_id": "cx", "event_timestamp": [start + pd.Timedelta(s, "s") for s in (21, 60, 180, 500, 3_600)]})
    score = world.intent(rows, events)
    assert (np.diff(score[:4]) < 0).all()
    assert score[0] > 0.3 > 0.01 > score[3]
    assert 0 < score[4] < 0.01  # a visit may always start


def test_optimum_knows_of_a_treatment(tmp_path):
    treated = World(tmp_path, customers=800, days=84, seed=4, knobs=Knobs(treatment_effect=0.5, experiment_day=14))
    rows = decision_points(treated.events)
    inside = (
        treated.people_of(rows)["is_treated"].to_numpy(dtype=bool)
        & (rows["event_timestamp"] > pd.Timestamp(END) - timedelta(days=70)).to_numpy()
    )
    assert misses(treated.intent(rows)[inside], rows["label"][inside]) < 3.5
    blind = World.__new__(World)
    blind.__dict__ = {
        **treated.__dict__,
        "truth": Truth(treated.truth.shop, treated.truth.people.assign(is_treated=False), treated.truth.items),
    }
    assert misses(blind.intent(rows)[inside], rows["label"][inside]) > 3.5  # control


# -- items -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranking(world):
    at = END - timedelta(days=HORIZON)
    seen = world.events[(world.events["type"] == "view") & (world.events["event_timestamp"] < at)]
    customers = seen["customer_id"].value_counts().loc[lambda n: n >= 30].index.to_numpy()[:250]
    items = world.truth.items.index.to_numpy()
    people = world.truth.people.loc[[customer[1:] for customer in customers]]
    latent = np.column_stack([np.stack(people["taste"].to_list()), people["price_sensitivity"]])
    return at, seen, customers, items, latent


def test_taste_follows_the_hidden_one_and_most_where_there_are_views(world, ranking):
    at, _, customers, _, latent = ranking
    found = taste.modes(world.truth, world.events, customers, at=at)
    early = taste.modes(world.truth, world.events, customers, at=END - timedelta(days=180))
    fit = [np.corrcoef(found[:, d], latent[:, d])[0, 1] for d in range(latent.shape[1])]
    weak = [np.corrcoef(early[:, d], latent[:, d])[0, 1] for d in range(latent.shape[1] - 1) if early[:, d].std() > 0]
    assert np.mean(fit) > 0.75
    assert np.mean(weak) < np.mean(fit) - 0.2


def test_item_scores_are_shares_of_what_is_on_offer(world, ranking):
    at, _, customers, items, _ = ranking
    score = item_scores(world.truth, world.events, customers, items, at=at, identities=world.identities)
    later = world.truth.items["available_from"].to_numpy() > pd.Timestamp(at)
    assert score.shape == (len(customers), len(items))
    assert later.any()
    assert (score[:, later] == 0).all()
    assert (score[:, ~later] > 0).all()
    assert score.sum(axis=1) == pytest.approx(1)
    some = item_scores(world.truth, world.events, customers[:3], np.array([items[5], "unheard of"]), at=at, identities=world.identities)
    assert some == pytest.approx(np.column_stack([score[:3, 5], np.zeros(3)]))


def test_latent_ranking_is_above_the_optimum_and_the_optimum_above_own_views_and_popularity(world, ranking):
    at, seen, customers, items, latent = ranking
    table = taste._attributes(world.truth, is_late=False)
    offered = world.truth.items["available_from"].to_numpy() <= pd.Timestamp(at)
    utility = np.where(offered, latent @ table.T + world.truth.items["quality"].to_numpy(), -np.inf)
    share = taste._softmax(utility)
    own = np.zeros_like(share)
    mine = seen[seen["customer_id"].isin(customers)]
    np.add.at(own, (pd.Index(customers).get_indexer(mine["customer_id"]), pd.Index(items).get_indexer(mine["item_id"])), 1.0)
    popular = np.tile(pd.Index(items).get_indexer(seen["item_id"]), 1)
    counts = np.tile(np.bincount(popular, minlength=len(items)).astype(float), (len(customers), 1))
    score = item_scores(world.truth, world.events, customers, items, at=at, identities=world.identities)
    gain = [
        np.take_along_axis(share, np.argsort(-s, axis=1)[:, :20], axis=1).sum(axis=1).mean()
        for s in (share, score, own + counts / 1e6, counts)
    ]
    assert gain[0] > gain[1] > gain[2] + 0.02 > gain[3] + 0.04


# -- leakage -----------------------------------------------------------------------------------------------------------


def test_nothing_at_or_after_the_row_matters_and_what_came_before_does(world, churn_rows, intent_rows):
    cut = pd.Timestamp(END) - timedelta(days=56)
    rows = churn_rows[churn_rows["event_timestamp"] == cut].head(150)
    moments = intent_rows[intent_rows["event_timestamp"] < cut].tail(150)
    for instant, score in (
        (cut, lambda events: world.churn(rows, events)),
        (moments["event_timestamp"].max(), lambda events: world.intent(moments, events)),
    ):
        late = (world.events["event_timestamp"] >= instant).to_numpy()
        assert late.any()
        shuffled = world.events.copy()
        order = np.random.default_rng(0).permutation(np.flatnonzero(late))
        shuffled.loc[late, "type"] = world.events["type"].to_numpy()[order]
        shuffled.loc[late, "customer_id"] = world.events["customer_id"].to_numpy()[order]
        expected = score(world.events)
        assert (score(shuffled) == expected).all()
        assert (score(world.events[~late]) == expected).all()
        assert (score(world.events.sample(frac=1, random_state=1)) == expected).all()
        early = world.events["event_timestamp"] < instant - timedelta(days=20)
        assert (score(world.events[~early]) != expected).any()  # control


def test_each_row_is_scored_as_if_it_were_alone(world, intent_rows):
    rows = intent_rows.sample(25, random_state=0)
    alone = np.concatenate(
        [world.intent(rows.iloc[[i]], world.events[world.events["event_timestamp"] < at]) for i, at in enumerate(rows["event_timestamp"])]
    )
    assert rows["score"].to_numpy() == pytest.approx(alone, abs=1e-12)


def test_an_event_counts_from_when_it_was_known(world):
    at = pd.Timestamp(END)
    times = [at - pd.Timedelta(s, "s") for s in (60, 30)]
    events = pd.DataFrame(
        {"customer_id": "cx", "type": ["view", "cart_add"], "item_id": "i00001", "event_timestamp": times, "created_timestamp": times}
    )
    late = events.assign(created_timestamp=[times[0], at])
    rows = pd.DataFrame({"customer_id": ["cx"], "event_timestamp": [at]})
    assert world.intent(rows, late)[0] == world.intent(rows, events.head(1))[0] != world.intent(rows, events)[0]


def test_items_see_nothing_at_or_after_the_instant(world, ranking):
    at, _, customers, items, _ = ranking
    some = customers[:40]
    past = world.events[(world.events["event_timestamp"] < at) & (world.events["created_timestamp"] < at)]
    full, cut = (item_scores(world.truth, e, some, items, at=at, identities=world.identities) for e in (world.events, past))
    assert (full == cut).all()
    half = item_scores(
        world.truth, past[past["event_timestamp"] < at - timedelta(days=60)], some, items, at=at, identities=world.identities
    )
    assert (half != cut).any()


# -- edges -------------------------------------------------------------------------------------------------------------


def test_no_rows_and_unknown_customers_get_usable_answers(world):
    rows = pd.DataFrame({"customer_id": ["nobody"], "event_timestamp": [pd.Timestamp(END)]})
    empty = world.events.head(0)
    for events in (world.events, empty):
        assert world.churn(rows.head(0), events).shape == (0,)
        assert world.intent(rows.head(0), events).shape == (0,)
        assert 0.2 < world.churn(rows, events)[0] < 1
        assert 0 < world.intent(rows, events)[0] < 0.01
        scores = item_scores(
            world.truth, events, np.array(["nobody"]), world.truth.items.index.to_numpy(), at=END, identities=world.identities
        )
        assert scores.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "knobs", [Knobs(bias=1.0), Knobs(drift="outage", strength=0.9, onset_day=20), Knobs(drift="concept", strength=1.0, onset_day=28)]
)
def test_scores_stay_probabilities_where_events_are_missing_or_laws_change(knobs, tmp_path):
    broken = World(tmp_path, customers=200, days=56, seed=3, knobs=knobs)
    rows = decision_points(broken.events)
    for score in (broken.intent(rows), broken.churn(rows)):
        assert ((score >= 0) & (score <= 1)).all()


def test_truth_is_reached_from_the_optimum():
    assert optimum.Truth is Truth
