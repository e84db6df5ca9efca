"""What is taken out of the log to be played again: whole people, never the erased, and nobody is disturbed."""

from contextlib import closing

import numpy as np

from pipelines.log import open_log
from pipelines.parity import recorded
from pipelines.vault import open_vault


def recording(town, people, seed=1):
    with closing(open_vault(town.home)) as vault:
        return recorded.record(town.home, vault=vault, people=people, rng=np.random.default_rng(seed))


def keep(town, calls):
    with closing(open_log(town.home, settings=town.settings)) as log:
        log.append(calls)
    return calls


def test_home_without_a_log_has_nothing_to_give(town):
    assert recording(town, 3).calls == ()


def test_calls_come_back_as_they_were_appended_and_in_order(town):
    calls = keep(town, town.logged([town.call(n, n, user=f"u{n % 3}", device=f"d{n % 4}") for n in range(40)]))
    assert list(recording(town, 100).calls) == calls


def test_people_come_whole_with_all_who_are_named_with_them(town):
    told = [town.call(f"{p}-{n}", n, user=f"u{p}", device=f"d{p}-{n % 2}") for p in range(6) for n in range(4)]
    told += [town.call(f"{p}-alone", 9, device=f"d{p}-1") for p in range(6)]
    keep(town, town.logged(told))
    for people in (1, 3):
        found = recording(town, people)
        assert (found.people, len(found.calls), found.left_out) == (people, 5 * people, 30 - 5 * people)
        assert len({call.subjects[-1] for call in found.calls}) == 2 * people


def test_chosen_people_differ_by_seed(town):
    keep(town, town.logged([town.call(p, p, user=f"u{p}") for p in range(30)]))
    assert len({recording(town, 1, seed).calls[0].subjects for seed in range(8)}) > 2


def test_more_calls_than_are_played_leave_people_out(town, monkeypatch):
    monkeypatch.setattr(recorded, "MOST_CALLS", 9)
    keep(town, town.logged([town.call(f"{p}-{n}", n, user=f"u{p}") for p in range(6) for n in range(4)]))
    assert (recording(town, 6).people, len(recording(town, 6).calls)) == (2, 8)


def test_erased_people_never_enter(town):
    keep(town, town.logged([town.call(f"{p}-{n}", n, user=f"u{p}") for p in range(4) for n in range(3)]))
    with closing(open_vault(town.home)) as vault:
        vault.entomb([vault.pseudonym("user_id", "u1")], erased_us=1, receipt="r")  # and the log has their calls still
    found = recording(town, 10)
    assert (found.people, len(found.calls)) == (3, 9)
    assert b'"u1"' not in b"".join(call.payload for call in found.calls)


def test_groups_of_the_log_stand_where_they_stood_and_what_they_have_done_can_go(town):
    keep(town, town.logged([town.call(n, n, user="ann") for n in range(6)]))
    with closing(open_log(town.home, settings=town.settings)) as log:
        log.commit("clean", [event.position for event in log.read("clean", max_events=4)])
        before = log.group_counts("clean")
        recording(town, 5)
        assert log.group_counts("clean") == before
        log.commit("clean", [event.position for event in log.read("clean", max_events=4)])
        assert log.trim(before_us=2**60) == 6  # no group of ours holds it back
    found = recording(town, 5)
    assert (found.calls, found.trimmed) == ((), 6)
