"""How much the worker takes on at a time: what there is time for between two looks for calls, by what the last ones took.

In: how many were done in how many seconds of the processor's time: were those counted in which it is somebody else's, a busy machine
would make for few at a time, and these cost more each. Out: how many may be done next, so that a call that comes meanwhile waits for no
more work than a slice; where calls wait already, than a share of what they have waited. Reads no clock.
"""

SLICE_S = 0.01  # of work at most, where one of them does not take longer
SHARE = 0.25  # of the time for which the worker has been behind


class Pace:
    """Of one kind of work."""

    def __init__(self) -> None:
        self._each_s: float | None = None

    def fitting(self, most: int, *, slice_s: float = SLICE_S, behind_s: float = 0.0) -> int:
        """How many to do next: one at least, and before the first are known."""
        if self._each_s is None:
            return 1
        if self._each_s <= 0.0:
            return most
        return int(max(1.0, min(most, max(slice_s, SHARE * behind_s) / self._each_s)))

    def took(self, n: int, seconds: float) -> None:
        """So many took so long. What is dearer counts at once, what is cheaper by halves."""
        if n:
            each_s = seconds / n
            self._each_s = each_s if self._each_s is None else max(each_s, (self._each_s + each_s) / 2)
