import threading

import numpy as np
import optuna
import pandas as pd
import pytest
from scipy import sparse

from models.classifier import Classifier
from models.recommender import Recommender
from pipelines.errors import PipelineError
from pipelines.training import tune
from pipelines.training.tuning import fingerprint


class Bowl:
    """A learner whose loss is known: smallest where x is what it was trained on. Counts its fits."""

    fits = 0

    def __init__(self, *, x=0.9, random_state=0, steepness=1.0):
        self.x, self.random_state, self.steepness = x, random_state, steepness

    @staticmethod
    def suggest(trial):
        return {"x": trial.suggest_float("x", 0.0, 1.0)}

    def fit(self, goal, validation=None):
        type(self).fits += 1
        self.goal_ = goal
        return self

    def loss(self, validation):
        return self.steepness * abs(self.x - self.goal_)


def rows(n=300, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"spend": rng.normal(size=n), "region": rng.choice(["north", "south"], n)})
    return frame, (rng.random(n) < 1 / (1 + np.exp(-2 * frame["spend"]))).to_numpy(dtype=float)


def test_same_seed_gives_the_same_parameters_and_another_seed_others():
    first, again, other = (tune(Bowl, (0.3,), None, n_trials=8, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first["x"] != other["x"]
    assert abs(first["x"] - 0.3) < 0.3


def test_defaults_are_the_first_trial():
    seen = []
    tune(Bowl, (0.9,), None, n_trials=1, seed=1, on_trial=seen.append)
    assert seen[0].user_attrs["params"] == {"x": 0.9, "random_state": 1}


def test_fixed_parameters_reach_the_learner_and_the_answer():
    params = tune(Bowl, (0.3,), None, n_trials=2, seed=1, fixed={"steepness": 3.0})
    assert params["steepness"] == 3.0
    assert Bowl(**params).steepness == 3.0


def test_killed_search_resumes_where_it_was_and_ends_as_an_unbroken_one(tmp_path):
    unbroken = tune(Bowl, (0.3,), None, n_trials=14, seed=3, journal=tmp_path / "a.log", study_name="s")

    class Killed(Bowl):
        def fit(self, goal, validation=None):
            if Killed.fits == 9:
                Killed.fits += 1
                raise KeyboardInterrupt
            return super().fit(goal, validation)

    Killed.fits = 0
    with pytest.raises(KeyboardInterrupt):
        tune(Killed, (0.3,), None, n_trials=14, seed=3, journal=tmp_path / "b.log", study_name="s")
    seen = []
    resumed = tune(Killed, (0.3,), None, n_trials=14, seed=3, journal=tmp_path / "b.log", study_name="s", on_trial=seen.append)
    assert resumed == unbroken
    assert len(seen) == 14
    assert Killed.fits == 15  # one of them was broken off
    assert tune(Killed, (0.3,), None, n_trials=14, seed=3, journal=tmp_path / "b.log", study_name="s") == unbroken
    assert Killed.fits == 15  # nothing is left to run


def orphan(journal):
    """A trial whose process was killed outright: nobody told the study."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    optuna.create_study(study_name="s", storage=storage, load_if_exists=True).ask()


def test_trial_of_a_dead_process_is_closed_and_not_counted(tmp_path):
    journal = tmp_path / "journal.log"
    unbroken = tune(Bowl, (0.3,), None, n_trials=4, seed=3)
    orphan(journal)
    assert tune(Bowl, (0.3,), None, n_trials=4, seed=3, journal=journal, study_name="s") == unbroken
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    states = [trial.state.name for trial in optuna.load_study(study_name="s", storage=storage).trials]
    assert states == ["FAIL", *["COMPLETE"] * 4]


def test_half_written_record_at_the_end_of_the_journal_is_cut_off(tmp_path):
    journal = tmp_path / "journal.log"
    tune(Bowl, (0.3,), None, n_trials=3, seed=3, journal=journal, study_name="s")
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "worker')
    torn = tmp_path / "torn.log"
    torn.write_bytes(journal.read_bytes())
    with pytest.raises(ValueError, match=r"Expecting|delimiter|Unterminated|Invalid"):  # control: Optuna alone glues and fails
        orphan(torn)
    resumed = tune(Bowl, (0.3,), None, n_trials=5, seed=3, journal=journal, study_name="s")
    assert resumed == tune(Bowl, (0.3,), None, n_trials=5, seed=3)


def test_timeout_keeps_the_trials_that_were_made():
    seen = []
    assert tune(Bowl, (0.3,), None, n_trials=50, seed=1, timeout_s=1e-9, on_trial=seen.append)["x"] == 0.9
    assert len(seen) == 1


def test_search_without_a_finite_loss_says_so():
    with pytest.raises(PipelineError, match="none of 2 trials"):
        tune(Bowl, (float("nan"),), None, n_trials=2, seed=1)


def test_parameters_without_a_finite_loss_are_passed_over():
    class Cliff(Bowl):
        def loss(self, validation):
            return float("nan") if self.x > 0.5 else super().loss(validation)

    assert tune(Cliff, (0.3,), None, n_trials=8, seed=1)["x"] <= 0.5


def test_study_of_other_data_is_another_study(tmp_path):
    journal = tmp_path / "journal.log"
    tune(Bowl, (0.3,), None, n_trials=3, seed=1, journal=journal)
    before = Bowl.fits
    tune(Bowl, (0.8,), None, n_trials=3, seed=1, journal=journal)
    assert Bowl.fits == before + 3


@pytest.mark.parametrize("learner", [Classifier, Recommender])
def test_both_learners_are_tuned_the_same_way(learner):
    if learner is Classifier:
        train, validation = rows(), rows(seed=1)
    else:
        train = sparse.random(30, 20, density=0.2, format="csr", rng=np.random.default_rng(0))
        validation = sparse.random(30, 20, density=0.1, format="csr", rng=np.random.default_rng(1))
    first, again = (tune(learner, train, validation, n_trials=2, seed=5) for _ in range(2))
    assert first == again
    assert learner(**first).get_params()["random_state"] == 5


def test_fingerprint_sees_values_order_names_and_types():
    frame, label = rows(5)
    same = fingerprint(frame.copy(), label.copy())
    assert fingerprint(frame, label) == same
    for other in (
        frame.iloc[::-1],
        frame.rename(columns={"spend": "spent"}),
        frame.assign(spend=frame["spend"] + 1e-12),
        frame.assign(spend=frame["spend"].astype("float32")),
    ):
        assert fingerprint(other, label) != same
    assert fingerprint(frame, 1 - label) != same
    matrix = sparse.csr_matrix(np.eye(3))
    assert fingerprint(matrix) != fingerprint(sparse.csr_matrix(np.eye(3)[::-1]))


def test_loss_of_a_trial_is_the_mean_over_all_origins(tmp_path):
    seen = []
    words = {"n_trials": 30, "seed": 3, "earlier": [((0.7,), None)]}
    between = tune(Bowl, (0.3,), None, **words, on_trial=seen.append)
    assert all(trial.value == pytest.approx((abs(x - 0.3) + abs(x - 0.7)) / 2) for trial in seen if (x := trial.params["x"]) is not None)
    assert 0.25 < between["x"] < 0.75
    assert tune(Bowl, (0.3,), None, **words) == between


def test_search_space_of_a_task_takes_the_place_of_the_learners():
    seen = []
    params = tune(
        Bowl, (0.3,), None, n_trials=6, seed=1, suggest=lambda trial: {"x": trial.suggest_float("x", 0.8, 0.95)}, on_trial=seen.append
    )
    assert 0.8 <= params["x"] <= 0.95
    assert all(0.8 <= trial.params["x"] <= 0.95 for trial in seen)


def test_line_that_another_process_is_writing_is_not_cut_off(tmp_path):
    from optuna.storages.journal import JournalFileSymlinkLock

    from pipelines.training.tuning import _mend

    journal = tmp_path / "journal.log"
    tune(Bowl, (0.3,), None, n_trials=2, seed=3, journal=journal, study_name="s")
    half, rest = b'{"op_code": 99, "wor', b'ker_id": "w"}\n'
    lock = JournalFileSymlinkLock(str(journal))
    lock.acquire()
    with journal.open("ab") as file:
        file.write(half)
    cutter = threading.Thread(target=_mend, args=(journal,))
    cutter.start()
    cutter.join(timeout=0.3)
    assert cutter.is_alive()  # it waits for who is writing
    with journal.open("ab") as file:
        file.write(rest)
    lock.release()
    cutter.join(timeout=30)
    assert journal.read_bytes().endswith(half + rest)
