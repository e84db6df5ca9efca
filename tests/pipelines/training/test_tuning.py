import multiprocessing
import os
import signal
import time
from contextlib import closing

import numpy as np
import pandas as pd
import psutil
import pytest
from scipy import sparse

from models.classifier import Classifier
from models.recommender import Recommender
from pipelines.errors import PipelineError
from pipelines.training import tune, tuning
from pipelines.training.study import Storage, open_study


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
    unbroken = tune(Bowl, (0.3,), None, n_trials=14, seed=3, storage=Storage(tmp_path / "a.log"), study_name="s")

    class Killed(Bowl):
        def fit(self, goal, validation=None):
            if Killed.fits == 9:
                Killed.fits += 1
                raise KeyboardInterrupt
            return super().fit(goal, validation)

    Killed.fits = 0
    with pytest.raises(KeyboardInterrupt):
        tune(Killed, (0.3,), None, n_trials=14, seed=3, storage=Storage(tmp_path / "b.log"), study_name="s")
    seen = []
    resumed = tune(Killed, (0.3,), None, n_trials=14, seed=3, storage=Storage(tmp_path / "b.log"), study_name="s", on_trial=seen.append)
    assert resumed == unbroken
    assert len(seen) == 14
    assert Killed.fits == 15  # one of them was broken off
    assert tune(Killed, (0.3,), None, n_trials=14, seed=3, storage=Storage(tmp_path / "b.log"), study_name="s") == unbroken
    assert Killed.fits == 15  # nothing is left to run


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
    tune(Bowl, (0.3,), None, n_trials=3, seed=1, storage=Storage(journal))
    before = Bowl.fits
    tune(Bowl, (0.8,), None, n_trials=3, seed=1, storage=Storage(journal))
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


def test_loss_of_a_trial_is_the_mean_over_all_origins(tmp_path):
    seen = []
    words = {"n_trials": 30, "seed": 3, "earlier": [((0.7,), None)]}
    between = tune(Bowl, (0.3,), None, **words, on_trial=seen.append)
    whole = [trial for trial in seen if trial.value is not None]
    assert all(trial.value == pytest.approx((abs(trial.params["x"] - 0.3) + abs(trial.params["x"] - 0.7)) / 2) for trial in whole)
    assert 0.25 < between["x"] < 0.75
    assert tune(Bowl, (0.3,), None, **words) == between


NEAR = {"n_trials": 30, "seed": 3, "earlier": [((0.32,), None), ((0.25,), None)]}


def twentieths(trial):
    return {"x": trial.suggest_int("twentieths", 0, 20) / 20}


def test_trials_that_are_behind_are_pruned_which_saves_fits_and_changes_no_winner(monkeypatch):
    found = {}
    for unpruned in (tuning.UNPRUNED, 1_000):  # the second: control, nothing is pruned
        monkeypatch.setattr(tuning, "UNPRUNED", unpruned)
        seen, before = [], Bowl.fits
        params = tune(Bowl, (0.3,), None, **NEAR, suggest=twentieths, on_trial=seen.append)
        found[unpruned] = params, Bowl.fits - before, [trial.state.name for trial in seen]
    (params, fits, states), (unpruned_params, unpruned_fits, unpruned_states) = found.values()
    assert params == unpruned_params
    assert params["x"] == 0.3
    assert unpruned_fits == 3 * 30
    assert fits < 0.8 * unpruned_fits
    assert states[0] == "COMPLETE"  # the defaults, far off as they are
    assert "PRUNED" in states
    assert "PRUNED" not in unpruned_states


def test_pruned_trial_was_tried_at_the_oldest_origins_alone_and_tells_how_it_stood():
    seen = []
    tune(Bowl, (0.3,), None, **NEAR, on_trial=seen.append)
    pruned = [trial for trial in seen if trial.state.name == "PRUNED"]
    for trial in pruned:
        off = [abs(trial.params["x"] - goal) for goal in (0.25, 0.32)]
        assert trial.value is None
        assert list(trial.intermediate_values.values()) == pytest.approx(
            [np.mean(off[: n + 1]) for n in range(len(trial.intermediate_values))]
        )
    assert {len(trial.intermediate_values) for trial in pruned} <= {1, 2}
    assert all(len(trial.intermediate_values) == 3 for trial in seen if trial not in pruned)


def test_pruned_trials_are_kept_and_not_tried_again(tmp_path):
    words = {**NEAR, "storage": Storage(tmp_path / "journal.log"), "study_name": "s"}
    first, again = [], []
    tune(Bowl, (0.3,), None, **{**words, "n_trials": 15}, on_trial=first.append)
    before, made = Bowl.fits, sum(len(trial.intermediate_values) for trial in first)
    assert tune(Bowl, (0.3,), None, **words, on_trial=again.append) == tune(Bowl, (0.3,), None, **NEAR)
    assert [(trial.number, trial.state) for trial in again[:15]] == [(trial.number, trial.state) for trial in first]
    assert Bowl.fits - before == 2 * sum(len(trial.intermediate_values) for trial in again) - made


def test_search_space_of_a_task_takes_the_place_of_the_learners():
    seen = []
    params = tune(
        Bowl, (0.3,), None, n_trials=6, seed=1, suggest=lambda trial: {"x": trial.suggest_float("x", 0.8, 0.95)}, on_trial=seen.append
    )
    assert 0.8 <= params["x"] <= 0.95
    assert all(0.8 <= trial.params["x"] <= 0.95 for trial in seen)


class Uneven(Bowl):
    """Some trials take longer than others, so that those of several workers end in any order."""

    def fit(self, goal, validation=None):
        time.sleep(0.1 * ((self.x * 997) % 1))
        return super().fit(goal, validation)


class Doomed(Uneven):
    """The process that fits a certain trial first is killed, as by `kill -9`; `mark`: the file that says that it was."""

    mark = None

    def fit(self, goal, validation=None):
        if abs(self.x - 0.9) > 1e-9 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit(goal, validation)


def searched(learner=Uneven, **words):
    seen = []
    words = {"n_trials": 14, "seed": 3, "workers": 2, "earlier": [((0.32,), None)], **words}
    params = tune(learner, (0.3,), None, **words, on_trial=seen.append)
    return params, [(trial.number, trial.params["x"], trial.value) for trial in seen]


def sound(seen):
    return [trial for trial in seen if trial[2] is not None]


def test_several_workers_give_one_answer_in_whatever_order_their_trials_end(tmp_path):
    params, seen = searched(storage=Storage(tmp_path / "journal.log"))
    assert [number for number, _, _ in seen] == list(range(14))
    assert seen[0][1] == 0.9  # the defaults first
    assert params["x"] == min(sound(seen), key=lambda trial: trial[2])[1]
    assert 4 <= len(sound(seen)) < 14  # some are pruned, the same ones every time
    assert searched(learner=Bowl) == (params, seen)
    assert searched(learner=Bowl, seed=4)[1] != seen  # control


def test_worker_killed_with_nine_loses_no_trial_and_its_own_is_done_again(tmp_path):
    Doomed.mark = tmp_path / "killed"
    unbroken = searched(learner=Bowl)
    assert searched(learner=Doomed, storage=Storage(tmp_path / "journal.log")) == unbroken
    assert Doomed.mark.exists()


@pytest.mark.server
def test_workers_that_share_a_server_give_the_answer_of_a_journal_though_one_is_killed(tmp_path, postgresql_server):
    Doomed.mark = tmp_path / "killed"
    words, storage = {"n_trials": 10, "study_name": "shared"}, Storage(server=postgresql_server.url, heartbeat_s=1)
    assert searched(learner=Doomed, storage=storage, **words) == searched(learner=Bowl, storage=Storage(tmp_path / "journal.log"), **words)
    assert Doomed.mark.exists()
    with closing(open_study("shared/2", storage)) as study:
        assert sorted(study.finished()) == list(range(10))
        stored = [trial for trial in study._study.get_trials(deepcopy=False) if trial.state.is_finished()]
    assert len(stored) == 10  # each was made once, by one of the two: what the killed one had finished was not made again


def test_several_workers_take_up_a_search_that_was_broken_off(tmp_path):
    journal = tmp_path / "journal.log"
    searched(n_trials=5, storage=Storage(journal))
    before = journal.stat().st_size
    assert searched(n_trials=14, storage=Storage(journal)) == searched(learner=Bowl)
    assert journal.stat().st_size > before


class Held(Bowl):
    """Ten fits end; those that begin after them wait for the file `go_on` in the folder, in which each process leaves its number."""

    folder = None

    def fit(self, goal, validation=None):
        (self.folder / f"worker-{os.getpid()}").touch()
        with (self.folder / "begun").open("ab") as file:
            file.write(b"x")
            file.flush()
            is_held = file.tell() > 10
        while is_held and not (self.folder / "go_on").exists():
            time.sleep(0.01)
        return super().fit(goal, validation)


def has_ended(pid):
    """Or nobody has asked yet how it ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(is_so):
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_search_killed_with_nine_as_a_whole_is_taken_up_by_the_next_one(tmp_path):
    journal = tmp_path / "journal.log"
    words = {"storage": Storage(journal), "study_name": "s"}
    Held.folder = tmp_path
    doomed = multiprocessing.get_context("fork").Process(target=searched, args=(Held,), kwargs=words)
    doomed.start()
    with closing(open_study("s/2", Storage(journal))) as study:
        until(lambda: len(study.finished()) >= 4)
        doomed.kill()
        doomed.join()
        (tmp_path / "go_on").touch()
        workers = [int(path.name.partition("-")[2]) for path in tmp_path.glob("worker-*")]
        until(lambda: all(map(has_ended, workers)))  # they have seen that they are alone
        kept = study.finished()
        assert 4 <= len(kept) < 14
    params, seen = searched(Bowl, **words)
    assert (params, seen) == searched(Bowl)
    assert [(n, *other) for n, *other in seen if n in kept] == [(n, kept[n].params["x"], kept[n].value) for n in sorted(kept)]


def test_two_searches_of_one_name_share_the_trials(tmp_path):
    words = {"storage": Storage(tmp_path / "journal.log"), "study_name": "s", "workers": 1}
    beside = multiprocessing.get_context("fork").Process(target=searched, args=(Uneven,), kwargs=words)
    beside.start()
    here = searched(Uneven, **words)
    beside.join()
    assert beside.exitcode == 0
    assert here == searched(Bowl, workers=1)
    assert words["storage"].journal.read_text().count('"op_code":4') == 14  # each was made once


def test_worker_that_fails_says_why():
    class Broken(Bowl):
        def fit(self, goal, validation=None):
            raise ValueError("expected labels of both classes")

    with pytest.raises(PipelineError, match="ValueError: expected labels of both classes"):
        searched(learner=Broken)


def test_trial_knows_those_that_lie_further_back_than_the_workers_may_be_apart():
    """With n workers the answer is that of trials drawn and pruned one by one by what was known 2n - 1 trials before."""
    from pipelines.training.tuning import _Origin, _Search

    origins = [_Origin(Bowl(), (goal,), None) for goal in (0.32, 0.3)]

    def one_by_one(lag):
        search = _Search(Bowl, origins, Bowl.suggest, {"random_state": 3}, seed=3, n_trials=14, lag=lag, stop_at=None, parent=os.getpid())
        done = {}
        for number in range(14):
            done[number] = search.trial(number, done)
        return [(trial.params["x"], trial.value) for trial in done.values()]

    assert [(x, value) for _, x, value in searched(learner=Bowl)[1]] == one_by_one(3)
    assert one_by_one(1) != one_by_one(3)  # control
