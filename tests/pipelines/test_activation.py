"""Lists for a destination outside: nobody is on one who does not grant its purpose at that instant."""

import csv
import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines import activation, audit, consent, erasure, ingest, tables
from pipelines.activation import Scored, Segment, activate
from pipelines.errors import InputError
from pipelines.log import open_log
from pipelines.log.calls import parse
from pipelines.settings import Settings
from pipelines.vault import open_vault

START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = START + timedelta(days=10)
LOYAL = Segment("loyal")
QUICK = {"deadline": None, "derandomize": True, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}

# whose, on which purpose, whether it allows, on which day, whether it is their own word
WORD = st.tuples(
    st.sampled_from(["c0", "c1", "c2"]), st.sampled_from(["marketing", "personalization"]), st.booleans(), st.integers(0, 12), st.booleans()
)


def write_home(home: Path, words: list[tuple], *, customers: tuple[str, ...] = ("c0", "c1", "c2", "c3")) -> None:
    told = pd.DataFrame(words, columns=["customer_id", "purpose", "is_allowed", "day", "is_own"])
    at = pd.Timestamp(START) + pd.to_timedelta(told.pop("day"), "D")
    told = told.assign(
        basis=np.where(told.pop("is_own"), consent.STATED, consent.DECLARED + "contract"), identifier="user_id:" + told["customer_id"],
        source="s", policy_version="3", evidence="m", event_timestamp=at, created_timestamp=at,
    )  # fmt: skip
    tables.write(home, tables.CONSENTS, told.astype({"is_allowed": bool}))
    listed = pd.DataFrame({"customer_id": list(customers), "event_timestamp": pd.Timestamp(START)})
    tables.write(home, tables.CUSTOMER_SEGMENTS, listed.assign(rfm_tier="high", lifecycle="new", segment="loyal", version="1"))
    tables.write(
        home,
        tables.CUSTOMER_SCORES,
        listed.assign(
            churn_probability=np.linspace(0, 1, len(listed)), churn_version="1", intent_probability=0.5, intent_version="1"
        ),
    )  # fmt: skip
    owned = pd.DataFrame({"identifier": [f"user_id:{name}" for name in customers], "customer_id": list(customers)})
    tables.write(home, tables.IDENTITIES, owned.assign(event_timestamp=pd.Timestamp(START), created_timestamp=pd.Timestamp(START)))


def hand_over(home: Path, to: Path, audience: activation.Audience = LOYAL, **options) -> activation.Activation:
    given = {"purpose": "marketing", "settings": Settings(home=home), "by": "test", "as_of": NOW} | options
    return activate(home, audience, to=to, **given)


def listed(to: Path) -> list[str]:
    with to.open(newline="") as file:
        return [row[0] for row in csv.reader(file)][1:]


def grants(words: list[tuple], customer: str, purpose: str) -> bool:
    """In plain words: the newest word by now counts, of two at once the refusal; a basis until the first own word; no refusal since."""
    theirs = [(day, allows, own) for who, what, allows, day, own in words if (who, what) == (customer, purpose)]
    first_own = min((day for day, _, own in theirs if own), default=99)
    counting = [(day, not allows) for day, allows, own in theirs if day <= 10 and (own or day < first_own)]
    return bool(counting) and not max(counting)[1] and not any(day > 10 and not allows for day, allows, own in theirs)


def check_nobody_without_a_grant(folder: Path, words: list[tuple]) -> None:
    home = folder / "home"
    write_home(home, words)
    told = hand_over(home, folder / "list.csv")
    granting = {name for name in ("c0", "c1", "c2", "c3") if grants(words, name, "marketing")}
    may_hold = {name for name in granting if consent_to_store(words, name)}
    assert set(listed(folder / "list.csv")) <= granting
    assert set(listed(folder / "list.csv")) == may_hold
    assert told.asked == told.written + sum(told.left_out.values()) == 4
    assert sum(told.policies.values()) == told.written


def consent_to_store(words: list[tuple], customer: str) -> bool:
    return grants([word for word in words if word[3] <= 10], customer, "personalization")


@settings(max_examples=12, **QUICK)
@given(st.lists(WORD, max_size=12))
def test_nobody_without_a_grant_as_of_the_instant_is_ever_in_the_file(tmp_path_factory, words) -> None:
    check_nobody_without_a_grant(tmp_path_factory.mktemp("home"), words)


def test_control_without_the_filter_people_without_a_grant_are_in_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(consent, "state_at", lambda consents, rows, **_: np.ones(len(rows), bool))
    with pytest.raises(AssertionError):
        check_nobody_without_a_grant(tmp_path, [("c0", "marketing", True, 1, True), ("c1", "marketing", True, 11, True)])


def test_who_is_left_out_is_counted_with_the_reason(tmp_path) -> None:
    both = [(who, "personalization", True, 0, True) for who in ("c0", "c1", "c2")]
    write_home(tmp_path / "home", [*both, ("c0", "marketing", True, 0, True), ("c1", "marketing", True, 0, True),
                                   ("c1", "marketing", False, 1, True), ("c3", "marketing", True, 0, True)])  # fmt: skip
    told = hand_over(tmp_path / "home", tmp_path / "list.csv")
    assert (told.asked, told.written, told.policies) == (4, 1, {"3": 1})
    assert told.left_out == {"denied": 1, "no_consent": 1, "profile_not_allowed": 1}
    assert listed(tmp_path / "list.csv") == ["c0"]


def test_an_erased_person_is_left_out_even_where_the_tables_were_restored(tmp_path) -> None:
    write_home(tmp_path / "home", [(who, what, True, 0, True) for who in ("c0", "c1") for what in ("marketing", "personalization")])
    vault = open_vault(tmp_path / "home")
    vault.entomb(["user_id:c1"], erased_us=1, receipt="r")
    vault.close()
    told = hand_over(tmp_path / "home", tmp_path / "list.csv")
    assert told.left_out == {"erased": 1, "no_consent": 2}
    assert listed(tmp_path / "list.csv") == ["c0"]


def test_the_same_again_gives_the_same_bytes_for_the_owner_alone_and_a_line_in_the_trail(tmp_path) -> None:
    write_home(tmp_path / "home", [("c0", what, True, 0, True) for what in ("marketing", "personalization")])
    told = [hand_over(tmp_path / "home", tmp_path / f"{name}.jsonl", by="anna") for name in ("one", "two")]
    one, two = (tmp_path / f"{name}.jsonl" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes() == b'{"customer_id": "c0"}\n'
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"home", "one.jsonl", "two.jsonl"}
    entries = audit.entries(tmp_path / "home")
    assert [(entry.action, entry.by, entry.details["written"]) for entry in entries] == [("activate", "anna", 1)] * 2
    assert entries[0].details["policies"] == told[0].policies == {"3": 1}
    assert "c0" not in json.dumps(entries[0].details)


def test_nothing_is_written_where_the_trail_cannot_be(tmp_path, monkeypatch) -> None:
    write_home(tmp_path / "home", [("c0", what, True, 0, True) for what in ("marketing", "personalization")])

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audit, "record", refuse)
    with pytest.raises(Exception, match="No space left"):
        hand_over(tmp_path / "home", tmp_path / "list.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_customers_with_a_high_score_are_a_list_too(tmp_path) -> None:
    write_home(tmp_path / "home", [(who, what, True, 0, True) for who in ("c0", "c2", "c3") for what in ("marketing", "personalization")])
    told = hand_over(tmp_path / "home", tmp_path / "list.csv", Scored("churn_probability", 0.6))
    assert (told.asked, told.written, listed(tmp_path / "list.csv")) == (2, 2, ["c2", "c3"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"purpose": "profit"}, "analytics, personalization, marketing"),
        ({"audience": Segment("rich")}, r"\(loyal\), found 'rich'"),
        ({"audience": Segment("loyal", by="age")}, "segment, lifecycle, rfm_tier"),
        ({"audience": Scored("margin", 0.5)}, "churn_probability, intent_probability"),
        ({"identify": "name"}, "customer_id, email, phone, user_id"),
        ({"to": "list.xlsx"}, ".csv or .jsonl"),
        ({"to": "home/list.csv"}, "outside of"),
        ({"to": "nowhere/list.csv"}, "make the folder"),
    ],
    ids=["purpose", "segment", "by", "score", "identify", "form", "inside", "folder"],
)
def test_what_cannot_be_used_is_refused_with_what_can(tmp_path, options, said) -> None:
    write_home(tmp_path / "home", [])
    options = dict(options)
    to = tmp_path / options.pop("to", "list.csv")
    with pytest.raises(InputError, match=said):
        hand_over(tmp_path / "home", to, **options)
    assert not to.exists()


@pytest.mark.parametrize(
    ("value", "cell"),
    [("=1+2", "'=1+2"), ("-2", "'-2"), ("@a", "'@a"), ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"), ("+43123", "+43123"), ("a=b", "a=b")],
    ids=["equals", "minus", "at", "plus", "phone", "inside"],
)
def test_no_cell_starts_a_formula(value, cell) -> None:
    assert next(iter(csv.reader([activation._csv("user_id", [value]).splitlines()[1]]))) == [cell]


# -- through the log ---------------------------------------------------------------------------------------------------


def send(home: Path, message: str, minutes: float, user: str, *, allows: bool, **fields: object) -> None:
    """A call with a word on everything, into the log, as the collector would."""
    at = (START + timedelta(minutes=minutes)).isoformat()
    word = {"consent": {"categoryPreferences": dict.fromkeys(("personalization", "marketing"), allows)}}
    call = {"type": "identify", "messageId": message, "timestamp": at, "receivedAt": at, "userId": user, "context": word, **fields}
    options = Settings(home=home)
    vault = open_vault(home)
    log = open_log(home, settings=options, vault=vault)
    received = datetime.fromisoformat(at)
    log.append(parse(json.dumps(call).encode(), None, source="s", received=received, vault=vault, limits=options.collect).events)
    log.close()
    vault.close()


def list_everybody(home: Path) -> None:
    everybody = tables.read(home, tables.IDENTITIES, ["customer_id"]).drop_duplicates()
    rows = everybody.assign(event_timestamp=pd.Timestamp(START), rfm_tier="high", lifecycle="new", segment="loyal", version="1")
    tables.write(home, tables.CUSTOMER_SEGMENTS, rows)


def test_a_withdrawal_that_nobody_drained_yet_counts(tmp_path, monkeypatch) -> None:
    home = tmp_path / "home"
    for user in ("u1", "u2"):
        send(home, f"m-{user}", 0, user, allows=True)
    ingest.drain(home, settings=Settings(home=home))
    list_everybody(home)
    assert hand_over(home, tmp_path / "list.csv").written == 2
    send(home, "m3", 1, "u1", allows=False)
    with monkeypatch.context() as patch:  # the control: without the drain the list is as it was
        patch.setattr(ingest, "drain", lambda *_, **__: None)
        assert hand_over(home, tmp_path / "list.csv").written == 2
    told = hand_over(home, tmp_path / "list.csv")
    assert (told.written, told.left_out) == (1, {"denied": 1})


def test_people_are_called_by_their_newest_address_and_those_without_one_are_left_out(tmp_path) -> None:
    home = tmp_path / "home"
    send(home, "m1", 0, "u1", allows=True, traits={"email": "Anna.Old@example.org"})
    send(home, "m2", 5, "u1", allows=True, traits={"email": "ANNA@example.org"})
    send(home, "m3", 5, "u2", allows=True)
    ingest.drain(home, settings=Settings(home=home))
    list_everybody(home)
    told = hand_over(home, tmp_path / "list.csv", identify="email")
    assert listed(tmp_path / "list.csv") == ["anna@example.org"]
    assert told.left_out == {"no_email": 1}
    assert not [path for path in (home / "audit").iterdir() if b"anna@" in path.read_bytes().lower()]


def test_an_export_tells_to_whom_a_person_was_handed_over_and_an_erasure_forgets_it(tmp_path) -> None:
    home, settings_of = tmp_path / "home", Settings(home=tmp_path / "home")
    for user, allows in (("u1", True), ("u2", False), ("u3", True)):
        send(home, f"m-{user}", 0, user, allows=allows)
    ingest.drain(home, settings=settings_of)
    list_everybody(home)
    for name in ("mail.csv", "ads.jsonl"):
        hand_over(home, tmp_path / name, identify="user_id")
    told = erasure.export(home, "u1", settings=settings_of)["activations"]
    assert [(row["destination"], row["audience"], row["purpose"], row["identify"]) for row in told] == [
        ("mail.csv", "segment loyal", "marketing", "user_id"),
        ("ads.jsonl", "segment loyal", "marketing", "user_id"),
    ]
    assert erasure.export(home, "u2", settings=settings_of)["activations"] == []
    erasure.erase(home, "u1", settings=settings_of, by="test", as_of=NOW)
    assert tables.count(home, tables.ACTIVATIONS) == 2
    assert len(erasure.export(home, "u3", settings=settings_of)["activations"]) == 2
