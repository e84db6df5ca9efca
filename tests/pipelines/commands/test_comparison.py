from dataclasses import replace

import pytest

from models.evaluation import Interval
from pipelines.commands.comparison import ladder, show_challenge
from pipelines.comparison import Comparison, Foresight

EITHER = {"champion": 0.5, "challenger": 0.25}
FOUND = Comparison(
    model="churn", versions={"champion": "1", "challenger": "2"}, requests=1_500, customers=40, since="2026-06-28T23:57:00+00:00",
    until="2026-06-29T01:02:00+00:00", mean=EITHER, mean_difference=Interval(-0.25, -0.3, -0.2), rank_correlation=0.9, psi=0.123,
    same_band=0.9, moved={"low to high": 150}, row_ms={"champion": 0.2, "challenger": 0.1}, foresight=None, why_not="nothing is known",
    left_out=7,
)  # fmt: skip


@pytest.mark.parametrize("is_known", [False, True])
def test_figures_and_what_they_do_not_say_are_shown(capsys, is_known):
    told = Foresight(1_200, 300, EITHER, Interval(0.01, -0.02, 0.04), EITHER, Interval(-0.01, -0.02, -0.001))
    show_challenge(replace(FOUND, foresight=told, why_not=None) if is_known else FOUND)
    text = " ".join(capsys.readouterr().out.split())
    assert "1,500 requests about 40 customers, 2026-06-28 23:57 to 2026-06-29 01:02; 7 of other versions left out" in text
    assert "mean probability 0.5000 0.2500 -0.2500 (-0.3000 to -0.2000)" in text
    assert "rank correlation 0.9000, population stability index 0.1230" in text
    assert "90.0% of requests fall into the same band; 150 low to high" in text
    assert ("not known: nothing is known" in text) == (not is_known)
    assert ("auc 0.5000 0.2500 +0.0100 (-0.0200 to +0.0400)" in text) == is_known
    assert ("outcomes of 1,200 requests are known, 300 of them positive" in text) == is_known


def test_scores_that_cannot_be_ranked_are_said_to_be_so(capsys):
    show_challenge(replace(FOUND, rank_correlation=None))
    assert "rank correlation not to be told" in capsys.readouterr().out


def rung(name, ndcg, customers=50, **lead):
    return {"rung": name, "customers": customers, "ndcg": ndcg, "recall": 0.5, **lead}


def over(above, lead, low, high):
    return {"above": above, "compared": 40, "lead": lead, "low": low, "high": high}


def test_each_rung_is_told_and_one_that_is_not_better_than_the_one_below_it_plainly():
    rows = [
        rung("personal", 0.3),
        rung("folded_in", 0.32, 40, **over("personal", -0.01, -0.02, -0.005)),
        rung("stale", 0.31, 40, **over("personal", -0.01, -0.02, -0.005)),
        {"rung": "segment", "customers": 0, "why": "there are no features"},
        rung("popular", 0.1, **over("stale", 0.2, 0.1, 0.3)),
        rung("static", 0.1, **over("popular", 0.0, -0.01, 0.01)),
    ]
    first, *others = ladder(rows, "ndcg@20", 0.305)
    assert first == (
        "ndcg@20 of what each rung answers (customers): personal 0.3000 (50), folded_in 0.3200 (40), stale 0.3100 (40), "
        "segment not measured: there are no features, popular 0.1000 (50), static 0.1000 (50); without the places of new arrivals "
        "personal is 0.3050"
    )
    assert others == [
        "personal measured worse than stale, which stands below it, without places for new arrivals: "
        "-0.0100 (-0.0200 to -0.0050) of 40 customers",
        "popular is not shown to be better than static, which stands below it, without places for new arrivals: "
        "+0.0000 (-0.0100 to +0.0100) of 40 customers",
    ]
    assert "arrivals" not in ladder(rows, "ndcg@20", 0.3)[0]


def test_version_of_before_rungs_were_measured_says_nothing_of_them():
    assert ladder([], "ndcg@20", 0.3) == []
