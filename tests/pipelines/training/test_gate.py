"""The gate, one planted violation for each of its questions."""

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from models import evaluation
from pipelines.settings import GateSettings, MonitoringSettings, Settings, TrainingSettings
from pipelines.training.gate import Sheet, coverage, examine, kept, stability

SETTINGS = Settings(
    training=TrainingSettings(bootstrap_draws=200),
    gate=GateSettings(tolerated_loss=0.01, group_loss=0.03, max_ece=0.05, max_row_ms=5.0),
    monitoring=MonitoringSettings(min_group=200, min_group_positives=30),
)


def world(n=4_000, seed=0):
    """Test rows with the true probability of each, and two groups."""
    rng = np.random.default_rng(seed)
    truth = 1 / (1 + np.exp(-rng.normal(-0.5, 1.2, n)))
    groups = pd.DataFrame({"region": np.where(np.arange(n) % 4, "north", "south"), "gender": None})
    label = (rng.random(n) < truth).astype(float)
    sheet = Sheet(evaluation.auc, label, truth, pd.Series([f"c{i // 2}" for i in range(n)]), groups, score_one=lambda: None)
    return sheet, truth


def blurred(probability, by, seed=1):
    """The same rate, a worse order."""
    noise = np.random.default_rng(seed).normal(0, by, len(probability))
    logit = np.log(probability / (1 - probability)) + noise
    return 1 / (1 + np.exp(-logit / np.sqrt(1 + by**2)))


def failed(sheet, champion, *, is_newer=True, settings=SETTINGS):
    return {check.name: check.found for check in examine(sheet, champion, is_newer=is_newer, settings=settings) if not check.holds}


def test_a_better_version_passes_whether_newer_or_not():
    sheet, truth = world()
    champion = blurred(truth, 1.0)
    assert failed(sheet, champion) == {}
    assert failed(sheet, champion, is_newer=False) == {}


def test_a_version_as_good_passes_only_when_it_is_of_newer_data():
    sheet, truth = world()
    champion = blurred(truth, 0.01)
    assert failed(sheet, champion) == {}
    assert list(failed(sheet, champion, is_newer=False)) == ["better"]


def test_a_worse_version_is_refused_with_its_loss_and_its_interval():
    sheet, truth = world()
    found = failed(replace(sheet, probability=blurred(truth, 1.0)), truth)
    assert "not worse" in found
    assert found["not worse"].startswith("-0.0")
    assert " to -0.0" in found["not worse"]


def test_a_loss_beyond_the_tolerated_is_refused_though_few_rows_leave_it_unproven():
    sheet, truth = world(n=120)
    worse = replace(sheet, probability=blurred(truth, 0.2))
    loss = evaluation.auc(sheet.label, truth) - evaluation.auc(sheet.label, worse.probability)
    assert loss > SETTINGS.gate.tolerated_loss
    assert "not worse" in failed(worse, truth)
    lenient = SETTINGS.model_copy(update={"gate": SETTINGS.gate.model_copy(update={"tolerated_loss": 0.5})})
    assert "not worse" not in failed(worse, truth, settings=lenient)


def test_a_version_that_is_better_for_all_and_worse_for_one_group_is_refused_by_that_groups_name():
    sheet, truth = world()
    south = (sheet.groups["region"] == "south").to_numpy()
    champion = np.where(south, truth, blurred(truth, 1.5))
    traded = replace(sheet, probability=np.where(south, blurred(truth, 1.5), truth))
    found = failed(traded, champion)
    assert list(found) == ["no group worse"]
    assert "region south" in found["no group worse"]
    assert failed(sheet, champion) == {}  # control: without the trade it passes


def test_a_group_too_small_to_be_judged_is_not():
    sheet, truth = world(n=600)
    south = (sheet.groups["region"] == "south").to_numpy()
    traded = replace(sheet, probability=np.where(south, blurred(truth, 3.0), truth))
    champion = np.where(south, truth, blurred(truth, 3.0))
    assert "no group worse" not in failed(traded, champion)


def test_probabilities_that_lie_are_refused_unless_the_champions_lie_more():
    sheet, truth = world()
    bent = truth**2  # the same order
    assert list(failed(replace(sheet, probability=bent), truth)) == ["calibrated"]
    assert failed(replace(sheet, probability=bent), truth**4) == {}


def test_a_version_that_takes_too_long_a_row_is_refused():
    sheet, truth = world(n=400)
    quick = SETTINGS.model_copy(update={"gate": SETTINGS.gate.model_copy(update={"max_row_ms": 0.5})})
    found = failed(replace(sheet, score_one=lambda: time.sleep(0.002)), truth, settings=quick)
    assert list(found) == ["fast"]
    assert "limit 0.5 ms" in found["fast"]


@pytest.mark.parametrize("is_newer", [True, False])
def test_every_check_says_what_was_found(is_newer):
    sheet, truth = world(n=600)
    for check in examine(sheet, blurred(truth, 0.5), is_newer=is_newer, settings=SETTINGS):
        assert any(character.isdigit() for character in check.found)


def test_lists_that_show_much_less_of_the_catalogue_are_refused():
    assert coverage(0.41, 0.50, settings=SETTINGS).holds
    refused = coverage(0.39, 0.50, settings=SETTINGS)
    assert not refused.holds
    assert "39.0% of the catalogue in the lists, the champion's 50.0%; 20%" in refused.found


def test_segments_that_are_found_again_less_often_are_refused_unless_the_champions_are_no_better():
    assert stability(0.80, 0.95, settings=SETTINGS).holds
    assert stability(0.65, 0.65, settings=SETTINGS).holds
    assert not stability(0.65, 0.80, settings=SETTINGS).holds


def test_segments_whose_names_mean_other_customers_are_refused():
    assert kept(0.5, settings=SETTINGS).holds
    refused = kept(0.49, settings=SETTINGS)
    assert (refused.holds, refused.name) == (False, "the same names")
