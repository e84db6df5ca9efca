"""Who waits for calls is woken when they can be read: not before, and not half a second later."""

import threading
from contextlib import closing

from pipelines.log import bell
from pipelines.stream import wake as waking
from pipelines.stream.pace import SLICE_S
from pipelines.stream.wake import Wake


def test_whoever_is_woken_finds_the_call_at_once(world) -> None:
    with closing(Wake(world.home / "log")) as wake:
        for n in range(20):
            sender = threading.Thread(target=world.say, args=(n,), kwargs={"user": "u1"})
            sender.start()
            assert wake.wait(30.0)
            assert len(world.log.read("look", max_events=10)) == 1, "the bell is rung after the commit"
            sender.join()


def test_a_lone_call_is_applied_by_the_step_that_waits_for_it(world) -> None:
    world.step()
    for n in range(5):
        timer = threading.Timer(0.02, world.say, args=(n,), kwargs={"user": "u1", "product_id": "i1"})
        timer.start()
        assert world.stream.step(wait_s=30.0).applied == 1
        timer.join()


def test_a_bell_that_is_taken_away_or_cannot_be_rung_costs_nothing(world) -> None:
    with closing(Wake(world.home / "log")) as wake:
        (world.home / "log" / bell.NAME).unlink(missing_ok=True)
        world.say(0, user="u1")
        assert wake.wait(30.0)
    bell.ring(world.home / "nowhere")


def test_without_the_kernel_it_looks_on_until_what_was_written_can_be_read(world, monkeypatch) -> None:
    monkeypatch.setattr(waking, "_watched", lambda folder: None)
    monkeypatch.setattr(waking, "SETTLE_S", 3_600.0)
    with closing(Wake(world.home / "log")) as wake:
        wake._written_s = -3_600.0
        assert not wake.wait(0.01)
        world.say(0, user="u1")
        assert wake.wait(60.0)
        assert wake.wait(60.0), "a file is written before the commit is on the disk"


def test_as_many_are_applied_together_as_fit_a_slice_and_no_more_than_one_before_it_is_known_what_they_take(world, monkeypatch) -> None:
    held = world.stream._pace
    monkeypatch.setattr(held, "took", lambda n, seconds, took=held.took: took(n, n * SLICE_S / 10))
    for n in range(40):
        world.say(n, user=f"u{n % 3}", product_id="i1")
    read = []
    while found := world.stream.step().read:
        read.append(found)
    assert (read[0], sum(read)) == (1, 40)
    assert all(n >= 10 for n in read[1:-1]), "more where they have waited long"


def test_a_lone_call_that_takes_longer_than_a_slice_is_applied_by_the_step_that_waits_for_it(world, monkeypatch) -> None:
    monkeypatch.setattr(world.stream._pace, "fitting", lambda most, **told: 1)
    for n in range(3):
        timer = threading.Timer(0.02, world.say, args=(n,), kwargs={"user": "u1", "product_id": "i1"})
        timer.start()
        assert world.stream.step(wait_s=30.0).applied == 1
        timer.join()
