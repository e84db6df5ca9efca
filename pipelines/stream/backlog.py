"""Whose identifiers are since an ingest, and are not yet in the store and the state: taken over a few people at a time, between calls.

In: what the linker says of everybody. Out: the links of some, each once: of those whom the next calls name, or of whoever comes next. A
person's identifiers come together, or somebody would for a moment be two. Holds them in memory only: after a crash all are looked at anew.
"""

from collections.abc import Collection, Iterable

from pipelines.stream.identities import Linked


class Backlog:
    """What is left to be taken over. links: sorted by time within each identifier."""

    def __init__(self, links: Iterable[Linked] = ()) -> None:
        self._links: dict[str, list[Linked]] = {}
        for link in links:
            self._links.setdefault(link.identifier, []).append(link)
        self._people: dict[str, dict[str, None]] = {}  # whose identifiers they are now
        for name, some in self._links.items():
            self._people.setdefault(some[-1].customer_id, {})[name] = None

    def __len__(self) -> int:
        """Identifiers."""
        return len(self._links)

    def of(self, names: Iterable[str], customers: Iterable[str]) -> list[Linked]:
        """Those of these people, and of those whose identifiers these are."""
        if not self._links:
            return []
        theirs = {self._links[name][-1].customer_id for name in names if name in self._links}
        return self._taken(theirs.union(customers))

    def some(self, n_identifiers: int) -> list[Linked]:
        """Those of the next people, until there are so many identifiers."""
        people, n = [], 0
        for customer, names in self._people.items():
            if n >= n_identifiers:
                break
            people.append(customer)
            n += len(names)
        return self._taken(people)

    def drop(self, names: Iterable[str]) -> None:
        """The linker has said something newer of these."""
        for name in names:
            if name in self._links:
                customer = self._links.pop(name)[-1].customer_id
                del self._people[customer][name]
                if not self._people[customer]:
                    del self._people[customer]

    def _taken(self, customers: Collection[str]) -> list[Linked]:
        return [link for customer in customers for name in self._people.pop(customer, ()) for link in self._links.pop(name)]
