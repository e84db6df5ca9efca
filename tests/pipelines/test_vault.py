"""Pseudonyms are the same everywhere and mean nothing without the key; sealed cells open only with their person's key."""

import hashlib
import multiprocessing
import random
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from pipelines import vault
from pipelines.errors import StoreError
from pipelines.vault import Fact, open_vault

ANNA, BEN = "user_id:" + "a" * 32, "user_id:" + "b" * 32
EVERY_SIGN = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]

texts = st.text(max_size=30) | st.emails() | st.from_regex(r"\A\s*(\+|00)?[0-9 ()/-]{0,15}\s*\Z")


@pytest.fixture
def opened(tmp_path):
    with closing(open_vault(tmp_path)) as found:
        yield found


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A vault and a DuckDB connection that is bound to it."""
    with closing(open_vault(tmp_path_factory.mktemp("home"))) as found, duckdb.connect() as db:
        found.bind(db)
        yield found, db


def facts(subject, *values, kind="first_name", source="shop", event_us=1):
    return [Fact(subject, kind, value, source, event_us) for value in values]


def in_sql(db, expression, values):
    db.register("given", pa.table({"value": pa.array(values, pa.string())}))
    return [row[0] for row in db.sql(f"SELECT {expression} FROM given").fetchall()]


def bytes_under(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


# -- pseudonyms


@given(kind=st.sampled_from(vault.IDENTIFIERS), values=st.lists(texts, min_size=1, max_size=20))
@settings(max_examples=60)
def test_pseudonym_in_python_is_the_one_in_sql_whatever_the_text(twins, kind, values):
    found, db = twins
    ours = [found.pseudonym(kind, value) if vault.normalised(kind, value) else None for value in values]
    theirs = in_sql(db, f"'{kind}:' || {vault.pseudonym_sql(kind, 'value')}", values)
    assert ours == theirs


@pytest.mark.parametrize("kind", ["email", "phone", "user_id"])
def test_every_sign_there_is_is_normalised_alike_in_python_and_sql(twins, kind):
    around = [f"{sign}aΣ{sign}Bς{sign}" for sign in EVERY_SIGN]  # a sigma at the end of a word is lowered by its place
    assert in_sql(twins[1], vault.normalised_sql(kind, "value"), around) == [vault.normalised(kind, text) or None for text in around]


def test_null_and_what_holds_no_identifier_have_no_pseudonym_in_sql(twins):
    assert in_sql(twins[1], vault.pseudonym_sql("phone", "value"), [None, "n/a", "  "]) == [None, None, None]


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        ("email", " Anna@Example.COM\n", "anna@example.com"),
        ("phone", "0049 (170) 123-45 67", "+491701234567"),
        ("user_id", "\tu1 ", "u1"),
    ],
)
def test_spellings_of_one_identifier_are_one_pseudonym(opened, kind, one, other):
    assert opened.pseudonym(kind, one) == opened.pseudonym(kind, other)


def test_equal_values_of_two_kinds_are_two_pseudonyms(opened):
    assert len({opened.pseudonym(kind, "1234567").split(":")[1] for kind in vault.IDENTIFIERS}) == len(vault.IDENTIFIERS)


def test_half_a_character_has_a_pseudonym_of_its_own(opened):
    assert opened.pseudonym("user_id", "\ud800") != opened.pseudonym("user_id", "?")


def test_dictionary_of_known_addresses_recovers_nobody_without_the_key(tmp_path):
    addresses = [f"person{n}@example.com" for n in range(10_000)]
    with closing(open_vault(tmp_path / "here")) as here, closing(open_vault(tmp_path / "there")) as there:
        stored = {here.pseudonym("email", address) for address in addresses}
        guesses = {f"email:{digest(form.encode()).hexdigest()[:32]}" for digest in (hashlib.sha256, hashlib.md5, hashlib.blake2b)
                   for address in addresses for form in (address, f"email:{address}")}  # fmt: skip
        guesses |= {there.pseudonym("email", address) for address in addresses}  # an attacker's own installation
        assert len(stored) == 10_000
        assert not stored & guesses
        assert {here.pseudonym("email", address) for address in addresses} == stored  # control: with the key all are found


def test_statement_text_does_not_hold_the_key(twins):
    found, _ = twins
    statement = vault.pseudonym_sql("email", "value")
    assert found._pseudonym_key.hex() not in statement.encode().hex()


# -- sealed cells


@given(cells=st.lists(st.tuples(st.sampled_from([ANNA, BEN, vault.NOBODY]), st.binary(max_size=50)), max_size=10))
@settings(max_examples=25)
def test_cell_opens_with_its_own_subject_and_with_no_other(twins, cells):
    found, _ = twins
    subjects, plain = [subject for subject, _ in cells], [cell for _, cell in cells]
    sealed = found.seal(subjects, plain)
    assert found.unseal(subjects, sealed) == plain
    found.seal([ANNA, BEN], [b"", b""])
    assert found.unseal([BEN if subject == ANNA else ANNA for subject in subjects], sealed) == [None] * len(cells)


def test_bytes_that_are_no_cell_open_to_nothing(opened):
    (cell,) = opened.seal([ANNA], [b"secret"])
    damaged = bytes([cell[0] ^ 1]) + cell[1:]
    assert opened.unseal([ANNA] * 4, [b"", b"short", damaged, cell]) == [None, None, None, b"secret"]


def test_equal_cells_are_sealed_to_different_bytes(opened):
    assert len(set(opened.seal([ANNA] * 100, [b"same"] * 100))) == 100


def test_another_process_reads_what_this_one_sealed(opened, tmp_path):
    sealed = opened.seal([ANNA], [b"secret"])
    with closing(open_vault(tmp_path)) as other:
        assert other.unseal([ANNA], sealed) == [b"secret"]


def _seal_for_all(home, barrier, results):
    with closing(open_vault(home)) as found:
        barrier.wait()
        results.put(found.seal([f"user_id:{n:032x}" for n in range(200)], [b"mine"] * 200))


def test_processes_that_race_for_new_keys_agree_on_them(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    racers = [context.Process(target=_seal_for_all, args=(tmp_path, barrier, results)) for _ in range(2)]
    for racer in racers:
        racer.start()
    sealed = [results.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join(timeout=60)
    with closing(open_vault(tmp_path)) as found:
        for cells in sealed:
            assert found.unseal([f"user_id:{n:032x}" for n in range(200)], cells) == [b"mine"] * 200


# -- facts


def test_fact_told_again_is_kept_once_with_its_newest_time(opened):
    assert opened.remember(facts(ANNA, "Anna", "Ann", event_us=5)) == 2
    assert opened.remember([*facts(ANNA, "Anna", event_us=9), *facts(ANNA, "Anna", event_us=3)]) == 0
    assert [(fact.value, fact.event_us) for fact in opened.facts([ANNA])] == [("Ann", 5), ("Anna", 9)]


@given(
    told=st.lists(
        st.tuples(st.sampled_from([ANNA, BEN]), st.sampled_from(["email", "first_name"]), st.text(max_size=3), st.integers(0, 9)),
        max_size=25,
    )
)
@settings(max_examples=25)
def test_facts_in_any_order_and_any_portions_are_what_was_told(tmp_path_factory, told):
    with closing(open_vault(tmp_path_factory.mktemp("home"))) as found:
        for start in range(0, len(told), 4):
            found.remember(Fact(subject, kind, value, "shop", at) for subject, kind, value, at in told[start : start + 4])
        expected = {}
        for subject, kind, value, at in told:
            expected[subject, kind, value] = max(at, expected.get((subject, kind, value), 0))
        assert {(f.subject, f.kind, f.value): f.event_us for f in found.facts()} == expected
        assert found.facts([ANNA]) == [fact for fact in found.facts() if fact.subject == ANNA]


def test_half_a_character_is_kept_as_it_was_told(opened):
    opened.remember(facts(ANNA, "\ud800"))
    assert opened.facts([ANNA])[0].value == "\ud800"


# -- erasure


def shop_of(found, people=2_000):
    """Facts of many people in random order, so that the file's pages are split as they grow."""
    rng = random.Random(1)
    subjects = [f"user_id:{rng.getrandbits(128):032x}" for _ in range(people)]
    for start in range(0, people, 100):
        some = subjects[start : start + 100]
        found.remember(Fact(subject, kind, f"{kind} of {subject}", "shop", 1) for subject in some for kind in ("email", "street"))
    return subjects


def test_forgotten_fact_is_gone_and_what_else_its_subject_told_is_not(opened):
    opened.remember(facts(ANNA, "Anna", "Ann"))
    (sealed,) = opened.seal([ANNA], [b"secret"])
    assert opened.forget([*facts(ANNA, "Anna", event_us=99), *facts(BEN, "Anna")]) == 1
    assert [fact.value for fact in opened.facts()] == ["Ann"]
    assert opened.unseal([ANNA], [sealed]) == [b"secret"]


def test_destroyed_keys_and_facts_are_in_no_byte_of_the_vault(tmp_path):
    with closing(open_vault(tmp_path)) as found:
        subjects = shop_of(found)
        gone, stay = subjects[::20], subjects[1::20]
        with closing(sqlite3.connect(found.path)) as db:
            keys = dict(db.execute("SELECT subject, wrapped FROM keys").fetchall())
            sealed = db.execute("SELECT subject, sealed FROM facts").fetchall()
        assert found.destroy(gone) == 3 * len(gone)
        left = bytes_under(tmp_path / "vault")  # the vault is open: its -wal and -shm are among them
        traces = [subject.encode() for subject in gone] + [keys[subject] for subject in gone]
        traces += [cell for subject, cell in sealed if subject in set(gone)]
        assert [trace for trace in traces if trace in left] == []
        assert all(keys[subject] in left for subject in stay)  # control: a key that is kept is found
        assert found.facts(gone) == []
        assert len(found.facts(stay)) == 2 * len(stay)


def test_keys_that_are_only_deleted_and_overwritten_stay_in_the_file(tmp_path):
    with closing(open_vault(tmp_path)) as found:
        subjects = shop_of(found)
        for subject in subjects[::20]:
            found._db.execute("DELETE FROM facts WHERE subject = ?", (subject,))
            found._db.execute("DELETE FROM keys WHERE subject = ?", (subject,))
        found._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert found._db.execute("PRAGMA secure_delete").fetchone() == (1,)
        left = bytes_under(tmp_path / "vault")
    assert any(subject.encode() in left for subject in subjects[::20])  # the test above can fail


def test_cell_of_a_destroyed_key_opens_nowhere_not_even_where_the_key_was_in_use(opened, tmp_path):
    with closing(open_vault(tmp_path)) as other:
        sealed = opened.seal([ANNA, BEN], [b"anna", b"ben"])
        assert other.unseal([ANNA, BEN], sealed) == [b"anna", b"ben"]
        opened.destroy([ANNA])
        for found in (opened, other):
            assert found.unseal([ANNA, BEN], sealed) == [None, b"ben"]
            found.seal([ANNA], [b"again"])  # a new key does not open old cells
            assert found.unseal([ANNA, BEN], sealed) == [None, b"ben"]


def test_entombed_people_are_known_again_and_nothing_of_them_is_taken_in(opened):
    opened.remember(facts(ANNA, "Anna"))
    assert opened.entombed([ANNA, BEN]) == frozenset()
    assert opened.entomb([ANNA], erased_us=7, receipt="r1") == 1
    assert opened.entomb([ANNA], erased_us=8, receipt="r2") == 0
    opened.destroy([ANNA])
    assert opened.entombed(iter([ANNA, BEN])) == {ANNA}
    assert opened.receipt_of([BEN, ANNA]) == "r1"
    assert opened.receipt_of([BEN]) is None
    assert opened.remember([*facts(ANNA, "Anna"), *facts(BEN, "Ben")]) == 1
    sealed = opened.seal([ANNA, BEN], [b"late", b"late"])
    assert opened.unseal([ANNA, BEN], sealed) == [None, b"late"]
    assert [fact.value for fact in opened.facts()] == ["Ben"]


def test_tombstone_does_not_hold_the_pseudonym_and_is_made_alike_in_sql(twins):
    found, db = twins
    subjects = [found.pseudonym("email", f"t{n}@example.com") for n in range(50)]
    found.entomb(subjects[:25], erased_us=1, receipt="r")
    found.destroy(subjects[:25])
    marks = in_sql(db, vault.tombstone_sql("value"), subjects)
    assert {subject for subject, mark in zip(subjects, marks, strict=True) if mark in set(found.tombstones())} == set(subjects[:25])
    left = bytes_under(found.path.parent)
    assert not any(subject.split(":")[1].encode() in left for subject in subjects)


def test_destruction_that_a_reader_keeps_from_the_file_is_told(opened, tmp_path):
    opened.remember(facts(ANNA, "Anna"))
    opened._db.execute("PRAGMA busy_timeout = 50")
    with closing(sqlite3.connect(opened.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM facts").fetchall()
        with pytest.raises(StoreError, match="do it again"):
            opened.destroy([ANNA])
    opened.destroy([ANNA])
    assert ANNA.encode() not in bytes_under(tmp_path / "vault")


# -- the master key


def test_rotation_keeps_every_pseudonym_cell_and_fact(tmp_path):
    old, new = SecretStr("old master"), SecretStr("new master")
    with closing(open_vault(tmp_path, master=old)) as found:
        name, sealed = found.pseudonym("email", "a@b.c"), found.seal([ANNA], [b"secret"])
        found.remember(facts(BEN, "Ben"))
        assert found.rotate(new.get_secret_value().encode()) == 3
        assert found.seal([BEN], [b"x"])  # goes on with the new key
    with closing(open_vault(tmp_path, master=new)) as found:
        assert found.pseudonym("email", "a@b.c") == name
        assert found.unseal([ANNA], sealed) == [b"secret"]
        assert [fact.value for fact in found.facts()] == ["Ben"]
    with pytest.raises(StoreError, match="another master key"):
        open_vault(tmp_path, master=old)


def test_key_is_never_wrapped_by_a_master_key_that_was_rotated_away(opened, tmp_path):
    with closing(open_vault(tmp_path)) as other:
        other.rotate(b"new master")
        with pytest.raises(StoreError, match="another master key"):
            opened.seal([ANNA], [b"secret"])
        assert other.unseal([ANNA], other.seal([ANNA], [b"secret"])) == [b"secret"]


def test_home_opened_with_a_foreign_master_key_is_refused_and_stays_as_it_was(tmp_path):
    with closing(open_vault(tmp_path)) as found:
        sealed = found.seal([ANNA], [b"secret"])
    with pytest.raises(StoreError, match="another master key"):
        open_vault(tmp_path, master=SecretStr("not this one"))
    with closing(open_vault(tmp_path)) as found:
        assert found.unseal([ANNA], sealed) == [b"secret"]


def test_neither_raw_bytes_nor_plain_keys_are_on_disk(opened, tmp_path):
    opened.remember(facts(ANNA, "Anna Karenina"))
    opened.seal([ANNA], [b"Anna Karenina"])
    left = bytes_under(tmp_path / "vault")
    assert b"Karenina" not in left
    assert opened._keys[ANNA] not in left
    assert opened._pseudonym_key not in left
    assert ANNA.encode() in left  # control: the search finds what is there


def test_only_the_owner_may_read_the_vault_and_its_key(opened, tmp_path):
    opened.remember(facts(ANNA, "Anna"))
    files = [path for folder in ("vault", "keys") for path in (tmp_path / folder).iterdir()]
    assert {path.name for path in files} == {"vault.db", "vault.db-wal", "vault.db-shm", "master.key"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_vault_that_cannot_be_opened_says_so(tmp_path):
    (tmp_path / "vault").mkdir()
    (tmp_path / "vault" / "vault.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreError, match="could not be opened"):
        open_vault(tmp_path)


def test_key_made_beside_a_second_vault_of_the_process_is_there_after_another_process_left(tmp_path):
    """SQLite's locks are the process's: a handle of the file that is opened and closed beside its connections gives them all up."""
    script = "import sys; from pathlib import Path; from pipelines.vault import open_vault; open_vault(Path(sys.argv[1])).close()"
    with closing(open_vault(tmp_path)) as first, closing(open_vault(tmp_path)):
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60, cwd=Path(__file__).parents[2])
        first.seal([ANNA], [b"secret"])
        with closing(sqlite3.connect(f"file:{tmp_path}/vault/vault.db?mode=ro", uri=True)) as db:
            assert db.execute("SELECT count(*) FROM keys").fetchone() == (1,)
