"""Calls that come one after the other share a transaction; one that comes alone waits for nobody."""

from pipelines.stream import worker


def test_a_call_that_comes_soon_after_others_waits_for_its_next_and_one_alone_does_not(world, monkeypatch) -> None:
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if seconds:
            world.say(2, user="u3")

    world.step()
    monkeypatch.setattr(worker.time, "sleep", sleep)
    world.stream._begun_s = 0.0  # long ago
    world.say(0, user="u1")
    assert (world.stream.step(wait_s=5.0).read, slept) == (1, [0.0])
    monkeypatch.setattr(worker, "PACE_S", 3_600.0)
    world.say(1, user="u2")
    assert world.stream.step(wait_s=5.0).read == 2
    assert 0 < slept[1] <= 3_600.0
    world.say(3, user="u4")
    assert (world.step().read, len(slept)) == (1, 2), "where nobody waits for calls, they are not waited for"
