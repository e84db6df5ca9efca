"""How much one caller may send: token buckets. In: a rate, a burst, instants. Out: how long to wait. Counts; refuses nobody itself."""


class Bucket:
    """A token bucket with debt: whoever has any token left may send a whole batch, and then waits until it is paid back."""

    def __init__(self, rate_per_s: float, burst: float, at_s: float) -> None:
        self._rate_per_s, self._burst = rate_per_s, burst
        self._tokens, self._at_s = burst, at_s

    def wait_s(self, at_s: float) -> float:
        """Seconds until something is taken again; 0 where it is now."""
        self._tokens = min(self._burst, self._tokens + (at_s - self._at_s) * self._rate_per_s)
        self._at_s = at_s
        return max(0.0, (1 - self._tokens) / self._rate_per_s)

    def take(self, n: int) -> None:
        """So many were sent."""
        self._tokens -= n


class Rates:
    """A bucket for each valid key, known by its digest: there are never more of them than keys."""

    def __init__(self, rate_per_s: float, burst: float) -> None:
        self._rate_per_s, self._burst = rate_per_s, burst
        self._buckets: dict[bytes, Bucket] = {}

    def wait_s(self, digest: bytes, at_s: float) -> float:
        """Take one; seconds to wait, and nothing is taken, where there is none."""
        bucket = self._buckets.get(digest)
        if bucket is None:
            bucket = self._buckets[digest] = Bucket(self._rate_per_s, self._burst, at_s)
        wait_s = bucket.wait_s(at_s)
        if not wait_s:
            bucket.take(1)
        return wait_s
