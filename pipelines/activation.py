"""A list of customers -> a file for a destination outside, with those alone who grant the purpose at that instant.

In: members of a stored segment, or customers with a score above a bound; the consents. Out: one file, for its owner's eyes only, a line
in the audit trail, and a row for each person in the table `activations`, which an export tells them. What still waits in the log is
drained first, so that a word that was received counts. Fails closed: who said nothing, refused (at that instant or after it), is erased,
or whose profile may no longer be held, is left out and counted. Whoever reads the file later has to ask again: a word that comes after it
does not reach it.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import audit, consent, ingest, tables
from pipelines.errors import InputError, StoreError
from pipelines.settings import Settings
from pipelines.vault import Vault, normalised, open_vault

CUSTOMER = "customer_id"
IDENTIFY = (CUSTOMER, "email", "phone", "user_id")  # what a person may be called in the file
SEGMENTS_BY = ("segment", "lifecycle", "rfm_tier")
SCORES = ("churn_probability", "intent_probability")

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the start of a formula (OWASP, CSV Injection)
_PHONE = re.compile(r"\+[0-9]+\Z")  # reads as a number at worst, and a quote before it would make it none


class Audience(Protocol):
    """Who is asked for."""

    @property
    def title(self) -> str:
        """For the report and the audit trail."""

    def members(self, home: Path) -> list[str]:
        """Their customer_ids, each once. Raises InputError where there is no such list."""


@dataclass(frozen=True)
class Segment:
    """The members of a stored segment. `by`: of SEGMENTS_BY."""

    name: str
    by: str = "segment"

    @property
    def title(self) -> str:
        """For the report and the audit trail."""
        return f"{self.by} {self.name}"

    def members(self, home: Path) -> list[str]:
        """Their customer_ids."""
        _check_known("by", self.by, SEGMENTS_BY)
        rows = _stored(home, tables.CUSTOMER_SEGMENTS, self.by, "`rapport train segments`")
        found = rows[rows[self.by] == self.name]
        if found.empty:
            known = ", ".join(sorted(rows[self.by].dropna().unique())) or "none"
            raise InputError(f"activate: expected one of the stored values of {self.by} ({known}), found {self.name!r}")
        return sorted(found[CUSTOMER].unique())


@dataclass(frozen=True)
class Scored:
    """Customers whose score is at least this. `score`: of SCORES."""

    score: str
    at_least: float

    @property
    def title(self) -> str:
        """For the report and the audit trail."""
        return f"{self.score} >= {self.at_least:g}"

    def members(self, home: Path) -> list[str]:
        """Their customer_ids."""
        _check_known("score", self.score, SCORES)
        rows = _stored(home, tables.CUSTOMER_SCORES, self.score, "`rapport score`")
        return sorted(rows[CUSTOMER][rows[self.score] >= self.at_least].unique())


@dataclass(frozen=True)
class Activation:
    """What was handed over: asked = written + left out."""

    audience: str
    purpose: str
    identify: str
    to: str
    as_of: datetime
    asked: int
    written: int
    left_out: dict[str, int]  # no_consent, denied, erased, profile_not_allowed, no_email and so on -> people
    policies: dict[str, int]  # under which version of the privacy notice, or declared basis, those who are written granted it


def activate(
    home: Path,
    audience: Audience,
    *,
    to: Path,
    purpose: str,
    settings: Settings,
    by: str,
    as_of: datetime,
    identify: str = CUSTOMER,
    vault: Vault | None = None,
) -> Activation:
    """Write the people of the audience who grant `purpose` as of `as_of` to a CSV or JSON lines file; the same again gives the same file.

    to: .csv or .jsonl, outside of the home, which an erasure searches; replaced as a whole. identify: of IDENTIFY; all but customer_id
    are opened from the vault. by: who asks, for the audit trail. Raises InputError for a purpose, list or file that cannot be used,
    StoreError where the disk refuses; no file is then written.
    """
    _check_known("purpose", purpose, settings.consent.purposes)
    _check_known("identify", identify, IDENTIFY)
    form = _check_file(to, home)
    keys = vault or open_vault(home, master=settings.master_key)
    try:
        if (home / "log").is_dir():
            ingest.drain(home, settings=settings, vault=keys)
        asked = audience.members(home)
        kept, left_out, policies = _granting(home, asked, purpose=purpose, settings=settings, vault=keys, as_of=as_of)
        called = {customer: customer for customer in kept} if identify == CUSTOMER else _names(home, kept, identify, keys)
    finally:
        if vault is None:
            keys.close()
    left_out[f"no_{identify}"] = len(kept) - len(called)
    values = sorted(called.values())
    told = Activation(
        audience.title, purpose, identify, str(to), as_of, len(asked), len(values), {why: n for why, n in left_out.items() if n}, policies
    )
    details = {"audience": told.audience, "purpose": purpose, "identify": identify, "to": to.name, "as_of": as_of.isoformat()}
    counts = {"asked": told.asked, "written": told.written, "left_out": told.left_out, "policies": policies}

    def tell() -> None:  # first: a list that is out and of which nothing tells must not be
        row = {"event_timestamp": as_of, "audience": told.audience, "purpose": purpose, "identify": identify, "destination": to.name}
        rows = [{CUSTOMER: customer} | row for customer in sorted(called)]
        with tables.together(home) as change:
            change.append(tables.ACTIVATIONS, pa.Table.from_pylist(rows, tables.ACTIVATIONS.schema))
        audit.record(home, "activate", by=by, details=details | counts)

    _write(to, form(identify, values), before=tell)
    return told


def _granting(
    home: Path, asked: Sequence[str], *, purpose: str, settings: Settings, vault: Vault, as_of: datetime
) -> tuple[list[str], Counter[str], dict[str, int]]:
    """Those who grant the purpose, why the others are left out, and the policies of the former."""
    consents = _about(home, tables.CONSENTS, asked).to_pandas()
    now = pd.DataFrame({CUSTOMER: pd.Series(asked, dtype="object"), "event_timestamp": pd.Timestamp(as_of)})
    refusals = consents[(consents["purpose"] == purpose) & ~consents["is_allowed"].eq(True)]
    later = refusals[CUSTOMER][refusals["event_timestamp"] > pd.Timestamp(as_of)]  # known already: it counts
    allows = consent.state_at(consents, now, purpose=purpose)
    judged = {
        "erased": now[CUSTOMER].isin(_erased(home, asked, vault)).to_numpy(),
        "denied": now[CUSTOMER].isin(later).to_numpy() | ~allows & now[CUSTOMER].isin(refusals[CUSTOMER]).to_numpy(),
        "no_consent": ~allows,
        "profile_not_allowed": ~consent.state_at(consents, now, purpose=settings.consent.stored_for),
    }
    why = np.select(list(judged.values()), list(judged), default="")
    kept = now[CUSTOMER][why == ""]
    return list(kept), Counter(why[why != ""].tolist()), consent.policies(consents, kept, purpose=purpose)


def _erased(home: Path, asked: Sequence[str], vault: Vault) -> set[str]:
    """Of the customers those that an erasure has named, by id or by any identifier: also one that is still at work, or was undone."""
    names = _about(home, tables.IDENTITIES, asked)
    owners = [*zip(asked, asked, strict=True), *zip(names["identifier"].to_pylist(), names[CUSTOMER].to_pylist(), strict=True)]
    gone = vault.entombed({name for name, _ in owners})
    return {customer for name, customer in owners if name in gone}


def _names(home: Path, customers: Sequence[str], kind: str, vault: Vault) -> dict[str, str]:
    """What each customer was last called by this kind of identifier, normalised; not one that others used too."""
    rows = tables.read(home, tables.IDENTITIES, ["identifier", CUSTOMER]).drop_duplicates()
    rows = rows[rows["identifier"].str.startswith(f"{kind}:")].drop_duplicates("identifier", keep=False)
    rows = rows[rows[CUSTOMER].isin(customers)]
    owner: dict[str, str] = dict(zip(rows["identifier"], rows[CUSTOMER], strict=True))
    facts = [fact for fact in vault.facts(sorted(owner)) if fact.kind == kind]
    newest = sorted(facts, key=lambda fact: (fact.event_us, fact.value))
    return {owner[fact.subject]: normalised(kind, fact.value) for fact in newest}


def _about(home: Path, table: tables.Table, customers: Sequence[str]) -> pa.Table:
    """The rows of these customers."""
    assert table.schema is not None
    return tables.matching(home, table, pc.field(CUSTOMER).isin(pa.array(customers, pa.string())), table.schema.names)


def _stored(home: Path, table: tables.Table, column: str, made_by: str) -> pd.DataFrame:
    if not tables.exists(home, table):
        raise InputError(f"activate: expected the table {table.name}, found none in this home; run {made_by} first")
    return tables.read(home, table, [CUSTOMER, column])


# -- the file ----------------------------------------------------------------------------------------------------------


def _csv(column: str, values: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([(column,), *((_plain(value),) for value in values)])
    return text.getvalue()


def _jsonl(column: str, values: Sequence[str]) -> str:
    return "".join(json.dumps({column: value}) + "\n" for value in values)


_FORMS: Mapping[str, Callable[[str, Sequence[str]], str]] = {".csv": _csv, ".jsonl": _jsonl}


def _plain(value: str) -> str:
    """A cell that no spreadsheet runs."""
    return f"'{value}" if value.startswith(_FORMULA) and not _PHONE.match(value) else value


def _check_file(to: Path, home: Path) -> Callable[[str, Sequence[str]], str]:
    form = _FORMS.get(to.suffix)
    if form is None:
        raise InputError(f"activate: expected a file that ends in {' or '.join(_FORMS)}, found {to}")
    if to.is_dir() or not to.parent.is_dir():
        raise InputError(f"activate: expected a file in a folder that exists, found {to}; make the folder, or name another file")
    if to.resolve().is_relative_to(home.resolve()):
        raise InputError(f"activate: expected a file outside of {home}, found {to}; what lies in the home is nobody's to pick up")
    return form


def _write(to: Path, text: str, *, before: Callable[[], object]) -> None:
    """Replace the file as a whole, readable by its owner alone; `before` happens when its bytes are safe and it is not there yet."""
    draft = to.with_name(f".{to.name}.{os.getpid()}.draft")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text.encode(errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        before()
        draft.replace(to)
    except OSError as error:
        raise StoreError(f"activate: {to} could not be written ({error.strerror}); free space or mend its rights, then go on") from error
    finally:
        with suppress(OSError):
            draft.unlink()


def _check_known(what: str, found: str, known: Sequence[str]) -> None:
    if found not in known:
        raise InputError(f"activate: expected {what} to be one of {', '.join(known)}; found {found!r}")
