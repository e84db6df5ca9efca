import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from models import evaluation

seeds = st.integers(0, 10_000)


def _rows(seed: int, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Labels of both classes and scores with many ties."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, n)
    label[:2] = [0, 1]
    return label, np.round(rng.normal(size=n) + label, 1)


def _brute_auc(label: np.ndarray, score: np.ndarray) -> float:
    gap = score[label == 1][:, None] - score[label == 0][None, :]
    return float(np.mean((gap > 0) + 0.5 * (gap == 0)))


@given(seeds)
@settings(max_examples=25)
def test_auc_equals_counting_all_pairs_and_ties_count_half(seed: int) -> None:
    label, score = _rows(seed)
    assert evaluation.auc(label, score) == pytest.approx(_brute_auc(label, score), abs=1e-12)


@given(seeds)
@settings(max_examples=25)
def test_ranking_metrics_of_rows_see_neither_order_nor_scale(seed: int) -> None:
    label, score = _rows(seed)
    order = np.random.default_rng(seed).permutation(len(label))
    for metric in (evaluation.auc, evaluation.average_precision):
        assert metric(label[order], np.exp(score[order])) == pytest.approx(metric(label, score), abs=1e-12)
    assert evaluation.auc(label, -score) == pytest.approx(1 - evaluation.auc(label, score), abs=1e-12)


@given(seeds)
@settings(max_examples=25)
def test_an_integer_weight_is_that_many_copies_of_the_row(seed: int) -> None:
    label, score = _rows(seed)
    probability = 1 / (1 + np.exp(-score))
    times = np.random.default_rng(seed).integers(0, 4, len(label))
    times[:2] = 1
    for metric in (evaluation.auc, evaluation.average_precision, evaluation.log_loss, evaluation.brier):
        copied = metric(np.repeat(label, times), np.repeat(probability, times))
        assert metric(label, probability, weight=times) == pytest.approx(copied, abs=1e-12)


def test_average_precision_of_a_small_case_by_hand() -> None:
    # shown in order: 1, 0, 1 -> precision 1 at the first hit, 2/3 at the second
    assert evaluation.average_precision([1, 0, 1], [0.9, 0.8, 0.7]) == pytest.approx((1 + 2 / 3) / 2)
    # tied scores are one step: 2 hits among 3
    assert evaluation.average_precision([1, 0, 1], [0.5, 0.5, 0.5]) == pytest.approx(2 / 3)


def test_log_loss_and_brier_of_a_small_case_by_hand() -> None:
    assert evaluation.log_loss([1, 0], [0.8, 0.4]) == pytest.approx(-(np.log(0.8) + np.log(0.6)) / 2)
    assert evaluation.brier([1, 0], [0.8, 0.4]) == pytest.approx((0.04 + 0.16) / 2)
    assert np.isfinite(evaluation.log_loss([1], [0.0]))


def test_expected_auc_of_certain_labels_is_the_auc() -> None:
    label, score = _rows(3)
    assert evaluation.expected_auc(label, score) == pytest.approx(evaluation.auc(label, score), abs=1e-12)
    assert evaluation.expected_auc(label, score) != pytest.approx(evaluation.auc(label, -score), abs=1e-3)


def test_expected_auc_is_the_mean_over_drawn_labels_and_best_at_the_truth() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(2, 5, 3_000)
    score = p + rng.normal(0, 0.1, len(p))
    drawn = [evaluation.auc(rng.random(len(p)) < p, score) for _ in range(60)]
    assert evaluation.expected_auc(p, score) == pytest.approx(np.mean(drawn), abs=0.004)
    assert evaluation.expected_auc(p, p) > evaluation.expected_auc(p, score)


def test_calibration_error_is_small_for_the_truth_and_the_size_of_a_shift() -> None:
    rng = np.random.default_rng(1)
    p = rng.uniform(0.1, 0.8, 20_000)
    label = rng.random(len(p)) < p
    assert evaluation.expected_calibration_error(label, p) < 0.015
    assert evaluation.expected_calibration_error(label, p + 0.1) == pytest.approx(0.1, abs=0.01)


def test_calibration_error_of_tied_probabilities_does_not_depend_on_row_order() -> None:
    rng = np.random.default_rng(2)
    p = rng.choice([0.1, 0.3, 0.5], 500)
    label = (rng.random(500) < p).astype(int)
    order = np.argsort(label)
    assert evaluation.expected_calibration_error(label[order], p[order]) == pytest.approx(evaluation.expected_calibration_error(label, p))


def test_a_metric_that_cannot_be_formed_is_nan() -> None:
    assert np.isnan(evaluation.auc([1, 1], [0.1, 0.2]))
    assert np.isnan(evaluation.average_precision([0, 0], [0.1, 0.2]))
    assert np.isnan(evaluation.log_loss([], []))
    assert np.isnan(evaluation.ndcg_at_k([[0]], sparse.csr_matrix((1, 3)), k=5))


@pytest.mark.parametrize(
    ("label", "score"),
    [([0, 2], [0.1, 0.2]), ([0, 1], [0.1, np.nan]), ([0, 1], [0.1]), ([0, np.nan], [0.1, 0.2]), ([[0, 1]], [[0.1, 0.2]])],
)
def test_rows_that_cannot_be_judged_are_refused(label: list, score: list) -> None:
    with pytest.raises(ValueError, match="metric"):
        evaluation.auc(label, score)


def test_probabilities_outside_the_unit_interval_are_refused() -> None:
    for metric in (evaluation.log_loss, evaluation.brier, evaluation.expected_calibration_error):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            metric([0, 1], [0.5, 1.5])


RELEVANT = sparse.csr_matrix(np.array([[1, 1, 0, 0, 0], [0, 0, 0, 0, 2], [0, 0, 0, 0, 0]]))


def test_the_ideal_list_has_ndcg_one_and_the_customer_without_relevant_items_does_not_count() -> None:
    ideal = [[1, 0, 3], [4, 0, 1], [0, 1, 2]]
    assert evaluation.ndcg_at_k(ideal, RELEVANT, k=3) == 1
    assert evaluation.recall_at_k(ideal, RELEVANT, k=3) == 1
    assert evaluation.mrr(ideal, RELEVANT, k=3) == 1
    assert np.isnan(evaluation.ndcg_by_customer(ideal, RELEVANT, k=3)[2])


def test_list_metrics_of_a_small_case_by_hand() -> None:
    items = [[2, 0, 3], [0, 1, 2], [0, 1, 2]]
    dcg, best = 1 / np.log2(3), 1 + 1 / np.log2(3)
    assert evaluation.ndcg_by_customer(items, RELEVANT, k=3)[:2] == pytest.approx([dcg / best, 0])
    assert evaluation.recall_by_customer(items, RELEVANT, k=3)[:2] == pytest.approx([0.5, 0])
    assert evaluation.reciprocal_rank_by_customer(items, RELEVANT, k=3)[:2] == pytest.approx([0.5, 0])
    assert evaluation.recall_by_customer(items, RELEVANT, k=1)[0] == 0


def test_repeated_items_and_empty_places_earn_nothing() -> None:
    assert evaluation.ndcg_at_k([[4, 4, 4]], RELEVANT[1], k=3) == 1
    assert evaluation.ndcg_at_k([[0, 0, 1]], RELEVANT[0], k=3) < 1
    assert evaluation.ndcg_at_k([[-1, -1, -1]], RELEVANT[0], k=3) == 0
    with pytest.raises(ValueError, match="items below 5"):
        evaluation.ndcg_at_k([[5]], RELEVANT[0], k=1)


def test_coverage_counts_each_shown_item_once() -> None:
    assert evaluation.coverage([[0, 1], [1, -1]], 4) == 0.5


def test_bootstrap_interval_of_a_mean_has_the_width_of_theory_and_repeats() -> None:
    values = np.random.default_rng(4).normal(0.3, 1.0, 400)
    statistic = evaluation.mean_difference(values, np.zeros(400))
    interval = evaluation.paired_bootstrap(statistic, np.arange(400), draws=800, seed=1)
    assert interval == evaluation.paired_bootstrap(statistic, np.arange(400), draws=800, seed=1)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low < interval.value < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)


def test_bootstrap_by_customer_is_wider_than_by_row_where_a_customers_rows_agree() -> None:
    values = np.repeat(np.random.default_rng(5).normal(size=40), 25)
    statistic = evaluation.mean_difference(values, np.zeros(1_000))
    by_customer = evaluation.paired_bootstrap(statistic, np.repeat(np.arange(40), 25), draws=300, seed=1)
    by_row = evaluation.paired_bootstrap(statistic, np.arange(1_000), draws=300, seed=1)
    assert by_customer.high - by_customer.low > 3 * (by_row.high - by_row.low)


def test_difference_to_oneself_is_zero_and_to_noise_is_clearly_positive() -> None:
    label, score = _rows(6, n=600)
    same = evaluation.paired_bootstrap(evaluation.difference(evaluation.auc, label, score, score), np.arange(600), draws=50, seed=1)
    assert same == evaluation.Interval(0.0, 0.0, 0.0)
    noise = np.random.default_rng(6).normal(size=600)
    better = evaluation.paired_bootstrap(evaluation.difference(evaluation.auc, label, score, noise), np.arange(600), draws=50, seed=1)
    assert better.low > 0.1


def test_draws_without_one_class_are_left_out() -> None:
    statistic = evaluation.difference(evaluation.auc, [1, 0, 0], [0.9, 0.1, 0.2], [0.5, 0.5, 0.5])
    interval = evaluation.paired_bootstrap(statistic, ["a", "b", "c"], draws=100, seed=1)
    assert (interval.value, interval.low, interval.high) == (0.5, 0.5, 0.5)


@given(values=st.lists(st.floats(0, 1), min_size=5, max_size=60), shift=st.floats(0, 1))
def test_population_stability_is_0_for_the_same_scores_and_never_less(values, shift):
    assert evaluation.psi(values, values) == 0.0
    assert evaluation.psi(values, [value + shift for value in values]) >= 0.0


def test_population_stability_counts_by_the_references_quantiles():
    reference = np.arange(100) / 100
    assert evaluation.psi(reference, reference[:50].repeat(2)) > 0.5  # half of the bins are empty
    assert evaluation.psi(reference, reference + 1e-9) < 0.01


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [([1, 2, 3, 4], [10, 20, 30, 1e9], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 1, 2, 3], [1, 1, 3, 2], 7 / 9)],
    ids=["only_the_order_counts", "reversed", "ties"],
)
def test_rank_correlation_is_spearmans(left, right, expected):
    from scipy.stats import spearmanr

    assert evaluation.rank_correlation(left, right) == pytest.approx(spearmanr(left, right).statistic)
    assert evaluation.rank_correlation(left, right) == pytest.approx(expected)


def test_rank_correlation_with_a_constant_is_not_a_number():
    assert np.isnan(evaluation.rank_correlation([1.0, 2.0], [3.0, 3.0]))
