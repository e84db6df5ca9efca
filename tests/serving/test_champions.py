import json
import shutil

import numpy as np
import pytest

from models.classifier import Classifier
from pipelines import registry
from serving import last_good
from serving.champions import Champions, band_cuts, rehearse_in_child
from serving.fallbacks import MODEL_REFUSED, NOT_TRAINABLE


@pytest.fixture
def loaded(home, rehearse):
    champions = Champions(home, rehearse=rehearse)
    champions.refresh()
    return champions


def versions(champions):
    return {name: champions.bundle.version(name) for name in ("churn", "intent", "recommender")}


def damage(home, name, version):
    path = next((home / "models" / name / str(version)).glob("*.lgb" if name != "recommender" else "item_factors.npy"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Broken:
    """Saves what the registry signs and no loader survives."""

    def __init__(self, learner, spoil):
        self.learner, self.spoil = learner, spoil

    def save(self, folder):
        self.learner.save(folder)
        self.spoil(folder)


def cut(folder):
    """The trees end in the middle: LightGBM ends the process that reads them."""
    path = folder / "model.lgb"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def shift(folder):
    """Every file loads, and every probability is another one."""
    path = folder / "classifier.json"
    saved = json.loads(path.read_text())
    saved["calibration"][1] += 1.0
    path.write_text(json.dumps(saved))


def test_champions_are_loaded_with_what_belongs_to_them(loaded, cast):
    assert versions(loaded) == {"churn": "1", "intent": "1", "recommender": "1"}
    assert loaded.bundle.why == {}
    assert loaded.bundle.recommender.customers[cast.customers[3]] == 3
    assert 0 < loaded.bundle.scorers["churn"].prior < 1


def test_nothing_is_rehearsed_again_while_nothing_changes(loaded):
    loaded._rehearse = None
    before = loaded.bundle
    loaded.refresh()
    assert loaded.bundle == before


def test_new_champion_is_swapped_in_as_one_bundle(loaded, home, cast):
    before = loaded.bundle
    assert cast.promote_recommender(home, seed=4) == 2
    loaded.refresh()
    assert versions(loaded)["recommender"] == "2"
    assert before.recommender.version == "1"  # who still holds the old bundle answers consistently
    registry.rollback(home, "recommender")
    loaded.refresh()
    assert versions(loaded)["recommender"] == "1"


@pytest.mark.parametrize("name", ["churn", "recommender"])
def test_damaged_champion_is_refused_before_it_is_loaded_and_the_last_good_stays(loaded, home, cast, name, caplog, monkeypatch):
    newer = _second(home, cast, name)
    damage(home, name, newer)
    monkeypatch.setattr("serving.champions._learner", lambda *_: pytest.fail("a damaged file reached a loader"))
    for _ in range(2):
        loaded.refresh()
    assert versions(loaded)[name] == "1"
    assert loaded.refused == {(name, newer)}
    assert caplog.text.count("was refused") == 1


def _second(home, cast, name):
    if name == "recommender":
        return cast.promote_recommender(home, seed=5)
    learner, _, base_rate = cast.classifier(name, 9)
    version = registry.register(home, name, learner=learner, manifest={"base_rate": base_rate})
    registry.promote(home, name, version)
    return version


def test_champion_damaged_before_the_start_leaves_a_named_gap(home, rehearse):
    damage(home, "churn", 1)
    champions = Champions(home, rehearse=rehearse)
    champions.refresh()
    assert versions(champions) == {"churn": None, "intent": "1", "recommender": "1"}
    assert champions.bundle.why == {"churn": MODEL_REFUSED}


@pytest.mark.parametrize("name", ["churn", "recommender"])
def test_champion_damaged_before_the_start_gives_way_to_the_version_that_was_used_last(loaded, home, cast, rehearse, name, caplog):
    newer = _second(home, cast, name)
    damage(home, name, newer)
    fresh = Champions(home, rehearse=rehearse)
    fresh.refresh()
    assert versions(fresh) == versions(loaded)
    assert fresh.refused == {(name, newer)}
    assert f"of {name} the version that was used last is looked at" in caplog.text
    registry.promote(home, name, 1)
    registry.promote(home, name, _second(home, cast, name))
    fresh.refresh()
    assert versions(fresh)[name] == str(newer + 1)  # and to the next that is sound


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("{"), lambda path: path.unlink()], ids=["unreadable", "vanished"])
def test_list_that_is_away_at_the_start_is_no_reason_to_answer_without_models(loaded, home, rehearse, spoil):
    spoil(home / "models" / "champions.json")
    fresh = Champions(home, rehearse=rehearse)
    fresh.refresh()
    assert versions(fresh) == versions(loaded)


def test_what_was_used_last_is_verified_too_and_is_not_what_was_rolled_back(loaded, home, cast, rehearse):
    newer = _second(home, cast, "churn")
    loaded.refresh()
    assert versions(loaded)["churn"] == str(newer)
    registry.rollback(home, "churn")
    damage(home, "churn", 1)
    fresh = Champions(home, rehearse=rehearse)
    fresh.refresh()
    assert (versions(fresh)["churn"], fresh.bundle.why["churn"]) == (None, MODEL_REFUSED)
    (home / "models" / "champions.json").unlink()
    damage(home, "churn", newer)
    fresh = Champions(home, rehearse=rehearse)
    fresh.refresh()
    assert fresh.refused == {("churn", newer)}


@pytest.mark.parametrize("content", ["", "[]", "null", '{"churn": "x"}', '{"churn": null}'])
def test_note_of_what_was_used_last_that_cannot_be_read_is_none(home, content):
    (home / "serving").mkdir(exist_ok=True)
    (home / "serving" / "last_good.json").write_text(content)
    assert last_good.read(home) == {}


def test_foreign_signature_is_refused(home, rehearse, tmp_path):
    (home / "keys" / "signing.key").write_text("00" * 32)
    champions = Champions(home, rehearse=rehearse)
    champions.refresh()
    assert set(versions(champions).values()) == {None}


@pytest.mark.slow
def test_model_that_kills_its_process_dies_in_the_child_and_the_others_come_through(home, cast):
    learner, _, _ = cast.classifier("churn", 9, rows=200)
    version = registry.register(home, "churn", learner=Broken(learner, cut), manifest={})
    folders = {name: home / "models" / name / "1" for name in ("intent", "recommender")}
    told = rehearse_in_child([("churn", home / "models" / "churn" / str(version)), *folders.items()])
    assert set(told) == {"intent", "recommender"}
    assert all(np.isfinite(values).all() for values in told.values())


def test_model_that_no_longer_says_what_it_said_at_training_is_refused(loaded, home, cast):
    learner, sample, _ = cast.classifier("churn", 9)
    told = learner.predict_proba(sample)[:, 1].tolist()
    golden = {"features": {c: [None if v != v else v for v in sample[c]] for c in sample}, "probability": told}
    version = registry.register(home, "churn", learner=Broken(learner, shift), manifest={"golden": golden})
    registry.promote(home, "churn", version)
    loaded.refresh()
    assert versions(loaded)["churn"] == "1"
    assert ("churn", version) in loaded.refused


def test_model_that_explains_one_customer_otherwise_than_several_is_refused(loaded, home, cast, monkeypatch):
    real = Classifier.explain_row
    monkeypatch.setattr(Classifier, "explain_row", lambda self, row: 2 * real(self, row))
    refused = _second(home, cast, "churn")
    loaded.refresh()
    assert versions(loaded)["churn"] == "1"
    assert ("churn", refused) in loaded.refused


def test_rehearsal_that_differs_from_the_loaded_model_is_refused(loaded, home, cast):
    loaded._rehearse = lambda pending: {name: (0.5,) for name, _ in pending}
    _second(home, cast, "churn")
    loaded.refresh()
    assert versions(loaded)["churn"] == "1"


def test_rehearsal_that_could_not_be_held_is_tried_again(loaded, home, cast, rehearse):
    loaded._rehearse = lambda pending: 1 / 0
    newer = _second(home, cast, "churn")
    loaded.refresh()
    assert versions(loaded)["churn"] == "1"
    loaded._rehearse = rehearse
    loaded.refresh()
    assert versions(loaded)["churn"] == str(newer)


def test_version_that_was_amended_is_loaded_again_once(loaded, home):
    def forget_the_first(folder, manifest):
        path = folder / "customer_ids.npy"
        names = np.load(path, allow_pickle=False)
        names[0] = ""
        np.save(path, names, allow_pickle=False)
        return {}

    forgotten = next(name for name, at in loaded.bundle.recommender.customers.items() if at == 0)
    registry.amend(home, "recommender", 1, why="a customer was erased", change=forget_the_first)
    loaded.refresh()
    amended = loaded.bundle.recommender
    assert forgotten not in amended.customers
    loaded.refresh()
    assert loaded.bundle.recommender is amended
    registry.promote(home, "recommender", 1)  # an entry that tells of no amendment is no reason to load again
    loaded.refresh()
    assert loaded.bundle.recommender is amended


def test_model_that_cannot_be_trained_says_so_with_its_prior(home, rehearse):
    shutil.rmtree(home / "models")
    registry.mark_untrainable(home, "churn", "too few customers", prior=0.3)
    champions = Champions(home, rehearse=rehearse)
    champions.refresh()
    assert champions.bundle.why == {"churn": NOT_TRAINABLE}
    assert champions.bundle.priors == {"churn": 0.3}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"churn": 3}'])
def test_unreadable_list_of_champions_changes_nothing(loaded, home, content):
    (home / "models" / "champions.json").write_bytes(content)
    loaded.refresh()
    assert set(versions(loaded).values()) == {"1"}


def test_vanished_list_of_champions_changes_nothing(loaded, home):
    shutil.rmtree(home / "models")
    loaded.refresh()
    assert set(versions(loaded).values()) == {"1"}


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.9, 1.0])
def test_bands_are_ordered(threshold):
    medium, high = band_cuts(threshold)
    assert 0 <= medium <= high <= 1
    assert medium == threshold


def test_saved_classifier_is_what_the_manifest_signs(home):
    manifest = json.loads((home / "models" / "churn" / "1" / "manifest.json").read_text())
    assert Classifier.load(home / "models" / "churn" / "1").feature_names_
    assert {"model.lgb", "classifier.json"} <= set(manifest["files"])
