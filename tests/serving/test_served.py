"""What models were fed: who is in the sample, what is kept of them, and that no answer ever waits for it."""

import multiprocessing
import threading
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import StoreError
from pipelines.served import Row, Served, file_of
from pipelines.settings import ServingSettings, Settings
from pipelines.vault import open_vault
from serving import served
from serving.answers import Answers
from serving.fallbacks import Deadline
from serving.served import Sample
from serving.wire import ScoreRequest

SHARE = 0.25


def settings_of(home, **serving):
    return Settings(home=home, serving=ServingSettings(**{"audit_share": SHARE, **serving}))


@pytest.fixture
def vault(tmp_path):
    with closing(open_vault(tmp_path)) as opened:
        yield opened


def row(customer="c1", served_us=1, version="churn 1", **values):
    return Row(customer, "churn_v1", version, served_us, served_us + 5, values or {"views_7d": 3, "region": None})


def kept(home):
    with closing(open_vault(home)) as vault, closing(Served(home, vault=vault)) as sample:
        return list(sample.rows())


def offer(sample, customers, values=(), **when):
    column = list(values) or list(range(len(customers)))
    when = {"served_us": 1, "read_us": 2, **when}
    sample.offer("churn_v1", "churn 1", dict(enumerate(customers)), lambda place: {"views_7d": column[place]}, **when)


# -- who is in it


def test_share_of_the_customers_is_in_the_sample_and_all_workers_choose_the_same(tmp_path, vault):
    customers = [f"c{n:016x}" for n in range(4_000)]
    one, other = (Sample(settings_of(tmp_path), vault=lambda: vault) for _ in range(2))
    chosen = {customer for customer in customers if one.has(customer)}
    assert chosen == {customer for customer in customers if other.has(customer)}
    assert abs(len(chosen) / len(customers) - SHARE) < 0.04


def test_another_home_chooses_others(tmp_path, vault):
    customers = [f"c{n:016x}" for n in range(400)]
    with closing(open_vault(tmp_path / "other")) as theirs:
        one, other = (Sample(settings_of(tmp_path), vault=lambda opened=opened: opened) for opened in (vault, theirs))
        assert {c for c in customers if one.has(c)} != {c for c in customers if other.has(c)}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nobody_and_everybody_can_be_asked_for(tmp_path, vault, share):
    sample = Sample(settings_of(tmp_path, audit_share=share), vault=lambda: vault)
    offer(sample, ["c1", "c2"])
    sample.close()
    assert len(kept(tmp_path)) == 2 * share


# -- what is kept


@given(st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.text(max_size=5), max_size=5))
def test_values_come_back_as_they_were(values):
    import tempfile
    from pathlib import Path

    class Nobody:
        def entombed(self, subjects):
            return frozenset()

    with tempfile.TemporaryDirectory() as folder, closing(Served(Path(folder), vault=Nobody())) as sample:
        told = Row("c1", "churn_v1", "churn 1", 1, 2, values)
        assert sample.add([told], now_us=1) == 1
        assert list(sample.rows()) == [told]
        assert sample.of(["c1", "c2"]) == [told]


def test_same_answer_given_again_is_kept_once_and_another_instant_or_model_beside_it(tmp_path, vault):
    with closing(Served(tmp_path, vault=vault)) as sample:
        assert [sample.add([row()], now_us=n) for n in (1, 2)] == [1, 0]
        assert sample.add([row(served_us=2), row(version="churn 2"), row(views_7d=4)], now_us=3) == 3


def test_what_is_old_or_too_much_goes_the_oldest_first(tmp_path, vault):
    with closing(Served(tmp_path, vault=vault)) as sample:
        for n in range(10):
            sample.add([row(served_us=n)], now_us=n)
        assert sample.prune(before_us=3, most=4) == 6
        assert [each.served_us for each in sample.rows()] == [6, 7, 8, 9]


def test_sample_is_pruned_by_whoever_writes(tmp_path, vault, monkeypatch):
    monkeypatch.setattr(served, "PRUNE_ROWS", 5)
    for n in range(8):
        sample = Sample(settings_of(tmp_path, audit_share=1.0, audit_rows=3), vault=lambda: vault)
        offer(sample, ["c1"], served_us=n, read_us=n)
        sample.close()
    assert len(kept(tmp_path)) <= 4


def test_erased_people_are_not_taken_in(tmp_path, vault):
    vault.entomb(["c1"], erased_us=1, receipt="r")
    with closing(Served(tmp_path, vault=vault)) as sample:
        assert sample.add([row("c1"), row("c2")], now_us=1) == 1
        assert [each.customer_id for each in sample.rows()] == ["c2"]


def test_file_is_for_its_owner_alone(tmp_path, vault):
    with closing(Served(tmp_path, vault=vault)) as sample:
        sample.add([row()], now_us=1)
    assert file_of(tmp_path).stat().st_mode & 0o77 == 0
    assert file_of(tmp_path).parent.stat().st_mode & 0o77 == 0


def _write_many(home, number):
    with closing(open_vault(home)) as vault:
        sample = Sample(settings_of(home, audit_share=1.0), vault=lambda: vault)
        for n in range(50):
            offer(sample, [f"c{number}"], served_us=n, read_us=n)
        sample.close()


def test_several_processes_write_and_nothing_is_lost(tmp_path, vault):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_many, args=(tmp_path, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(kept(tmp_path)) == 150


# -- never in the way


def dropped():
    return served.dropped()._value.get()


def test_full_queue_drops_and_counts_and_the_call_returns(tmp_path, vault, monkeypatch):
    gate, reached = threading.Event(), threading.Event()
    monkeypatch.setattr(Sample, "_write", lambda sample, rows, *, is_due: (reached.set(), gate.wait(60)))
    monkeypatch.setattr(served, "WRITE_S", 0.0)
    before, sample = dropped(), Sample(settings_of(tmp_path, audit_share=1.0), vault=lambda: vault, queue_rows=3)
    offer(sample, ["c1"])
    assert reached.wait(60)
    for _ in range(60):
        offer(sample, ["c1"])
    assert dropped() - before == 60 - 3  # that wait
    gate.set()
    sample.close()


def test_disk_that_refuses_drops_and_counts_and_the_next_rows_are_kept(tmp_path, vault, monkeypatch):
    real, failures = Served.add, [StoreError("served: full")]

    def add(store, rows, *, now_us):
        if failures:
            raise failures.pop()
        return real(store, rows, now_us=now_us)

    monkeypatch.setattr(Served, "add", add)
    monkeypatch.setattr(served, "WRITE_S", 0.0)
    before, sample = dropped(), Sample(settings_of(tmp_path, audit_share=1.0), vault=lambda: vault)
    offer(sample, ["c1"])
    while dropped() == before:
        pass
    offer(sample, ["c2"])
    sample.close()
    assert dropped() - before == 1
    assert [each.customer_id for each in kept(tmp_path)] == ["c2"]


def test_without_a_vault_nobody_is_chosen_and_the_answer_comes(tmp_path):
    def broken():
        raise StoreError("vault: no")

    before, sample = dropped(), Sample(settings_of(tmp_path, audit_share=1.0), vault=broken)
    offer(sample, ["c1", "c2"])
    assert dropped() - before == 2


# -- in the service


@pytest.mark.parametrize("task", ["churn", "intent"])
def test_what_a_score_was_computed_from_is_kept_with_its_model_and_instant(settings, rehearse, cast, task):
    everybody = settings.model_copy(update={"serving": settings.serving.model_copy(update={"audit_share": 1.0})})
    core = Answers(everybody, rehearse=rehearse)
    core.open()
    ids = [*cast.customers[:3], cast.denied, "nobody"]
    core.scoring.answer(task, ScoreRequest(customer_ids=ids), Deadline.after_ms(5_000))
    read = core.guard.ask(lambda p: p.read(f"{task}_v1", ids[:3], at=cast.now, deadline=Deadline.after_ms(60_000)))
    core.close()
    rows = {each.customer_id: each for each in kept(settings.home)}
    assert set(rows) == set(ids[:3])  # nobody who did not allow it
    for place, customer in enumerate(ids[:3]):
        assert rows[customer].values == {name: values[place] for name, values in read.columns.items()}
        assert (rows[customer].service, rows[customer].version) == (f"{task}_v1", f"{task} 1")
        assert rows[customer].served_us == rows[customer].read_us == round(cast.now.timestamp() * 1e6)


def test_control_nothing_is_kept_where_the_share_is_none(settings, rehearse, cast):
    core = Answers(settings.model_copy(update={"serving": settings.serving.model_copy(update={"audit_share": 0.0})}), rehearse=rehearse)
    core.open()
    core.scoring.answer("churn", ScoreRequest(customer_ids=cast.customers[:3]), Deadline.after_ms(5_000))
    core.close()
    assert not file_of(settings.home).exists()
