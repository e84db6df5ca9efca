"""How far a group has come with one partition of a Kafka topic, in the words that Kafka keeps for it: an offset and a line of text.

In: offsets that were given to readers and that they committed. Out: what to commit, from which the next reader of the partition knows
what is done, what is not, and how often each event was given. Knows no Kafka. The text is "1 NEXT FIRST+COUNTxTRIES ...": NEXT comes
after all offsets given so far, and FIRST counts from the committed offset.
"""

import re
from collections.abc import Iterator, Sequence

VERSION = "1"
MAX_TEXT = 3_500  # of the 4,096 bytes that brokers take unless told otherwise
_RUN = re.compile(r"(\d{1,12})\+(\d{1,6})x(\d{1,6})", re.ASCII)
_NEXT = re.compile(r"\d{1,19}", re.ASCII)


class Progress:
    """One partition. Of the offsets below `next`, those in `tries` are open and the others done. The text of others counts as none."""

    def __init__(self, offset: int, text: str = "") -> None:
        self.next = self._seen = offset
        self.tries: dict[int, int] = {}  # how often each open event was given
        version, following, *runs = [*text.split(" "), "", ""]
        if version == VERSION and _NEXT.fullmatch(following):
            self.next = max(offset, int(following))
            for run in filter(None, map(_RUN.fullmatch, runs)):
                first, count, tries = (int(number) for number in run.groups())
                self.tries |= dict.fromkeys(range(offset + first, min(offset + first + count, self.next)), tries)

    @property
    def offset(self) -> int:
        """What to commit: the first offset that is not done."""
        return min(self.tries, default=self.next)

    @property
    def text(self) -> str:
        """What to commit beside it. Where it would be too long, the later events count as never given: they come again."""
        base, following, words, length = self.offset, self.next, list[str](), 0
        for first, count, tries in self._runs():
            word = f"{first - base}+{count}x{tries}"
            length += len(word) + 1
            if length > MAX_TEXT:
                following = first
                break
            words.append(word)
        return " ".join([VERSION, str(following), *words])

    def see(self, offsets: Sequence[int]) -> set[int]:
        """Which of the offsets are not done, as the broker gives them in order; those that it skips are gone, and done."""
        if not offsets:
            return set()
        here = set(offsets)
        for gone in [offset for offset in self.tries if self._seen <= offset < offsets[-1] and offset not in here]:
            del self.tries[gone]
        self._seen = offsets[-1] + 1
        return {offset for offset in here if offset >= self.next or offset in self.tries}

    def give(self, offset: int) -> int:
        """Note that the event is given; returns how often it was before."""
        before = self.tries.get(offset, 0)
        self.tries[offset] = before + 1
        self.next = max(self.next, offset + 1)
        return before

    def commit(self, offset: int) -> None:
        """Note that the event is done."""
        self.tries.pop(offset, None)

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """First offset, number and tries of neighbours that were given equally often."""
        run: tuple[int, int, int] | None = None
        for offset in sorted(self.tries):
            tries = self.tries[offset]
            if run and offset == run[0] + run[1] and tries == run[2] and run[1] < 999_999:
                run = (run[0], run[1] + 1, tries)
                continue
            if run:
                yield run
            run = (offset, 1, tries)
        if run:
            yield run
