"""What became of a run's rows, for a person and for the ledger. Declares; does nothing."""

from collections import Counter
from dataclasses import dataclass, fields
from datetime import datetime

from pipelines.events import REASONS
from pipelines.ingest.permission import Basis
from pipelines.settings import ConsentSettings

_LINES = ("lines", "withdrawn", "near_duplicates", "outliers", "unmatched")  # counted in event rows


@dataclass(frozen=True)
class Tally:
    """What became of rows as read, an order of several products counting once.

    read = accepted + duplicate + quarantined; accepted = stored + consent_dropped + erased. Rows that were received before are
    duplicates; `readmitted` of them are now events: from quarantine, or kept out by a consent that has come since.
    """

    read: int = 0
    accepted: int = 0
    duplicate: int = 0
    quarantined: int = 0
    consent_dropped: int = 0
    erased: int = 0
    stored: int = 0
    readmitted: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Judged:
    """What became of a run's rows, and of the events that they became."""

    tally: Tally = Tally()
    reasons: Counter[str] | None = None  # of the rows that were set aside
    lines: int = 0
    withdrawn: int = 0
    near_duplicates: int = 0
    outliers: int = 0
    unmatched: int = 0

    def __add__(self, other: "Judged") -> "Judged":
        counts = (getattr(self, name) + getattr(other, name) for name in _LINES)
        return Judged(self.tally + other.tally, (self.reasons or Counter()) + (other.reasons or Counter()), *counts)


@dataclass(frozen=True)
class IngestReport:
    """What became of the rows. Rows as read, an order of several products counting once, except where event rows are named."""

    read: int
    accepted: int  # received for the first time
    duplicate: int
    quarantined: int
    consent_dropped: int
    erased: int  # they name an erased person
    stored: int  # of the accepted, the rows that are now events
    readmitted: int  # of the duplicates, the rows that are now events and were not before
    lines: int  # event rows that the stored and readmitted rows became
    withdrawn: int  # event rows of earlier runs taken out, because a refusal of before them has arrived
    near_duplicates: int  # of the lines, those flagged as such
    outliers: int
    unmatched: int  # returns of which no purchase is known
    reasons: dict[str, int]  # code of events.REASONS -> rows quarantined
    first_event: datetime | None  # of the whole events table, UTC
    last_event: datetime | None
    has_consent: bool  # whether any person's data may be used: by their statements, or on a declared basis
    units: dict[str, str]  # file -> the unit its unix times were found to be in
    notes: tuple[str, ...]  # sentences a person should read


def report(
    judged: Judged,
    *,
    span: tuple[datetime | None, datetime | None],
    has_consent: bool,
    units: dict[str, str] | None = None,
    notes: tuple[str, ...] = (),
) -> IngestReport:
    """The report of a run, or of several that were added up."""
    reasons, counts = judged.reasons or Counter(), judged.tally
    return IngestReport(
        **{field.name: getattr(counts, field.name) for field in fields(counts)},
        **{name: getattr(judged, name) for name in _LINES},
        reasons={reason: reasons[reason] for reason in REASONS if reasons[reason]},
        first_event=span[0],
        last_event=span[1],
        has_consent=has_consent,
        units=units or {},
        notes=notes,
    )


def notes(counts: Tally, *, source: str, basis: Basis | None, is_spoken: bool, consent: ConsentSettings) -> tuple[str, ...]:
    """What a person should know of a run over files."""
    told = []
    if counts.read and not counts.accepted + counts.quarantined + counts.readmitted:
        told.append("every row of these files was received before; nothing was added")
    if counts.consent_dropped and basis is None and not is_spoken:
        told.append(
            f"the source {source} carries no consent and no legal basis was declared for it, so none of its {counts.consent_dropped} rows "
            "may be used; declare one under [consent] in the mapping, or as RAPPORT_CONSENT__LEGAL_BASIS, and ingest them again"
        )
    elif counts.consent_dropped and basis is not None and not set(consent.stored_for) & set(basis.purposes):
        covered, wanted = ", ".join(basis.purposes), " or ".join(consent.stored_for)
        told.append(f"the legal basis of {source} covers {covered}, not {wanted}; {counts.consent_dropped} rows were not used")
    return tuple(told)
