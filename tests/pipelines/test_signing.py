"""What this home signed is known for it, and nothing else is: no other value, purpose, key or home."""

import multiprocessing
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import keyfile, signing
from pipelines.errors import StoreError

names = st.text(max_size=3)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | names,
    lambda some: st.lists(some, max_size=3) | st.dictionaries(names, some, max_size=3),
)
documents = st.dictionaries(names, values, max_size=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@given(one=documents, other=documents)
@settings(max_examples=60)
def test_document_is_signed_as_it_is_and_as_no_other(home, one, other):
    whole = signing.signed(home, "receipt", one)
    assert signing.is_signed(home, "receipt", whole)
    changed = {**other, "signature": whole["signature"]}
    assert signing.is_signed(home, "receipt", changed) == (
        changed == whole and repr(sorted(changed.items())) == repr(sorted(whole.items()))
    )


def test_signature_for_one_purpose_is_none_for_another(home):
    assert not signing.is_signed(home, "audit", signing.signed(home, "receipt", {"n": 1}))


@pytest.mark.parametrize("signature", ["", "0" * 64, None, 7])
def test_document_without_its_signature_is_not_signed(home, signature):
    assert not signing.is_signed(home, "receipt", {"n": 1, "signature": signature})
    assert not signing.is_signed(home, "receipt", {"n": 1})


def test_value_that_is_no_json_was_never_signed(home):
    assert not signing.is_signed(home, "receipt", {"n": float("nan"), "signature": "0" * 64})


def test_document_of_another_home_is_not_signed_here(home, tmp_path):
    foreign = signing.signed(tmp_path, "receipt", {"n": 1})
    assert not signing.is_signed(home, "receipt", foreign)
    assert signing.is_signed(tmp_path, "receipt", foreign)


def test_verifying_without_the_key_is_refused_and_makes_none(tmp_path):
    with pytest.raises(StoreError, match="signing key"):
        signing.is_signed(tmp_path, "receipt", {"signature": ""})
    assert not (tmp_path / "keys").exists()


def _make(path, secret, results):
    results.put(keyfile.kept(path, lambda: secret))


def test_first_runs_at_the_same_time_agree_on_one_secret(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    runs = [context.Process(target=_make, args=(tmp_path / "keys" / "k", f"secret {n}", results)) for n in range(6)]
    for run in runs:
        run.start()
    secrets = {results.get(timeout=30) for _ in runs}
    for run in runs:
        run.join(timeout=30)
    assert len(secrets) == 1
    assert keyfile.kept(tmp_path / "keys" / "k", lambda: "another") in secrets
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["k"]
    assert stat.S_IMODE((tmp_path / "keys" / "k").stat().st_mode) == 0o600
