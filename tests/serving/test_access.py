import base64
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from pipelines.errors import InputError, StoreError
from pipelines.settings import Settings
from serving import access, keyring
from serving.access import Need, Role
from serving.rates import Rates

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def bearer(key):
    return f"Bearer {key}".encode()


def role_of(keys, header):
    """Of the key in the header."""
    return keys.role_of_key(access.key_in(header))


def test_keys_are_generated_once_and_for_their_owner_only(tmp_path):
    mine = Settings(home=tmp_path)
    new = access.ensure_keys(mine)
    assert set(new) == set(Role)
    assert access.ensure_keys(mine) == {}
    for role, key in new.items():
        path = tmp_path / "keys" / f"{role}.key"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert access.read_key(mine, role) == key
        assert len(key) >= 40
    assert len(set(new.values())) == 3


def test_key_of_the_settings_is_used_and_not_written(tmp_path):
    mine = Settings(home=tmp_path, decide_key=SecretStr("given"))
    assert Role.DECIDE not in access.ensure_keys(mine)
    assert not (tmp_path / "keys" / "decide.key").exists()
    assert role_of(access.load_keys(mine), b"Bearer given") is Role.DECIDE


@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_key_of_the_settings_is_no_key(tmp_path, empty):
    mine = Settings(home=tmp_path, admin_key=SecretStr(empty))
    assert Role.ADMIN in access.ensure_keys(mine)
    keys = access.load_keys(mine)
    assert all(role_of(keys, header) is None for header in (b"Bearer ", b"Bearer", f"Bearer {empty}".encode(), b"", None))


def test_workers_that_start_together_agree_on_the_keys(tmp_path):
    mine = Settings(home=tmp_path)
    with ThreadPoolExecutor(8) as workers:
        made = list(workers.map(lambda _: access.ensure_keys(mine), range(32)))
    for role in Role:
        assert [new[role] for new in made if role in new] == [access.read_key(mine, role)]


def test_role_is_that_of_the_key_in_either_scheme(tmp_path):
    mine = Settings(home=tmp_path)
    new = access.ensure_keys(mine)
    keys = access.load_keys(mine)
    for role, key in new.items():
        basic = b"Basic " + base64.b64encode(f"{key}:".encode())
        assert role_of(keys, bearer(key)) is role
        assert role_of(keys, basic) is role
        assert role_of(keys, bearer(key.upper() + "x")) is None


def test_shared_key_means_the_stronger_role(tmp_path):
    same = SecretStr("one for all")
    keys = access.load_keys(Settings(home=tmp_path, collect_key=same, decide_key=same, admin_key=same))
    assert role_of(keys, b"Bearer one for all") is Role.ADMIN


def test_key_of_a_source_collects_for_that_source_alone(tmp_path):
    mine = Settings(home=tmp_path, sources={"shop": SecretStr("shop-key"), "app": SecretStr("app-key"), "blank": SecretStr(" ")})
    own = access.ensure_keys(mine)
    keys = access.load_keys(mine)
    assert {role_of(keys, bearer(key)) for key in ("shop-key", "app-key")} == {Role.COLLECT}
    found = [keys.source_of(key.encode()) for key in ("shop-key", "app-key", own[Role.COLLECT], own[Role.ADMIN])]
    assert found == ["shop", "app", "segment", "segment"]
    assert keys.role_of_key(b"") is keys.role_of_key(b" ") is None


def test_write_key_opens_collection_and_nothing_else():
    for path, route in access.ROUTES.items():
        is_let_in = access.refuse(route, Role.COLLECT, is_local=False) is None
        assert is_let_in == (path in access.COLLECTION or path == access.PIXEL or route.need is Need.NOTHING)


@settings(max_examples=200)
@given(header=st.one_of(st.none(), st.binary(max_size=60), st.binary(max_size=40).map(lambda b: b"Basic " + base64.b64encode(b))))
def test_no_other_header_is_a_key(header):
    keys = access.Keys(tuple((role, b"\0" * 32) for role in Role))
    assert role_of(keys, header) is None


# -- keys that are made, handed over, and revoked


def test_home_keeps_no_key_that_its_copy_was_taken_away_of(tmp_path):
    mine = Settings(home=tmp_path)
    new = access.ensure_keys(mine)
    for role in Role:
        (tmp_path / "keys" / f"{role}.key").unlink()
    entry, added = keyring.add(tmp_path, Role.DECIDE, at=NOW)
    assert entry.role == Role.DECIDE
    for path in tmp_path.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [key for key in (*new.values(), added) if key.encode() in content], path
    assert access.ensure_keys(mine) == {}
    assert all(role_of(access.load_keys(mine), bearer(key)) is role for role, key in new.items())
    with pytest.raises(access.KeyMissing, match="rapport keys add collect"):
        access.read_key(mine, Role.COLLECT)


def test_two_keys_of_a_role_are_valid_until_one_is_revoked(tmp_path):
    mine = Settings(home=tmp_path)
    first = access.ensure_keys(mine)[Role.DECIDE]
    entry, second = keyring.add(tmp_path, Role.DECIDE, at=NOW)
    valid = access.Valid(mine)
    valid.open()
    assert {role_of(valid.keys, bearer(key)) for key in (first, second)} == {Role.DECIDE}
    of_first = next(e.id for e in keyring.entries(tmp_path) if e.role == Role.DECIDE and e.id != entry.id)
    keyring.revoke(tmp_path, of_first, at=NOW)
    assert role_of(valid.keys, bearer(first)) is Role.DECIDE  # until the next look
    valid.refresh()
    assert (role_of(valid.keys, bearer(first)), role_of(valid.keys, bearer(second))) == (None, Role.DECIDE)
    assert not (tmp_path / "keys" / "decide.key").exists()
    with pytest.raises(InputError, match="no valid key has the id"):
        keyring.revoke(tmp_path, of_first, at=NOW)


def test_role_whose_keys_were_all_revoked_gets_no_new_one_by_itself(tmp_path):
    mine = Settings(home=tmp_path)
    key = access.ensure_keys(mine)[Role.ADMIN]
    for entry in keyring.entries(tmp_path):
        keyring.revoke(tmp_path, entry.id, at=NOW)
    assert access.ensure_keys(mine) == {}
    (tmp_path / "keys" / "admin.key").write_text(key)  # nor does bringing back the file help
    assert access.ensure_keys(mine) == {}
    assert role_of(access.load_keys(mine), bearer(key)) is None


def test_key_put_into_its_file_takes_the_place_of_the_generated_one(tmp_path):
    mine = Settings(home=tmp_path)
    old = access.ensure_keys(mine)[Role.DECIDE]
    (tmp_path / "keys" / "decide.key").write_text("my own key\n")
    assert access.ensure_keys(mine) == {}
    keys = access.load_keys(mine)
    assert (role_of(keys, b"Bearer my own key"), role_of(keys, bearer(old))) == (Role.DECIDE, None)


def test_key_of_the_settings_takes_the_place_of_the_generated_one_but_not_of_those_added(tmp_path):
    old = access.ensure_keys(Settings(home=tmp_path))[Role.DECIDE]
    _, added = keyring.add(tmp_path, Role.DECIDE, at=NOW)
    keys = access.load_keys(Settings(home=tmp_path, decide_key=SecretStr("given")))
    assert [role_of(keys, bearer(key)) for key in ("given", added, old)] == [Role.DECIDE, Role.DECIDE, None]


def test_keys_that_are_added_together_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as several:
        added = list(several.map(lambda _: keyring.add(tmp_path, Role.DECIDE, at=NOW)[1], range(24)))
    keys = access.load_keys(Settings(home=tmp_path))
    assert {role_of(keys, bearer(key)) for key in added} == {Role.DECIDE}
    assert stat.S_IMODE((tmp_path / "keys" / keyring.RING).stat().st_mode) == 0o600


def test_ring_that_cannot_be_read_stops_the_start_and_changes_nothing_while_running(tmp_path):
    mine = Settings(home=tmp_path)
    key = access.ensure_keys(mine)[Role.DECIDE]
    valid = access.Valid(mine)
    valid.open()
    (tmp_path / "keys" / keyring.RING).write_text("{")
    with pytest.raises(StoreError, match="is not a list of keys"):
        valid.refresh()
    assert role_of(valid.keys, bearer(key)) is Role.DECIDE
    with pytest.raises(StoreError):
        access.ensure_keys(mine)


def test_key_may_ask_for_its_burst_then_for_its_rate_whatever_others_do():
    rates = Rates(2.0, 3)
    assert [rates.wait_s(b"a", 0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert rates.wait_s(b"b", 0.0) == 0.0
    assert rates.wait_s(b"a", 0.5) == 0.0
    assert rates.wait_s(b"a", 0.5) == 0.5


# Who may use what, told again: the declaration in the module is what this table is held against.
ALLOWED = {
    Need.NOTHING: {None, Role.COLLECT, Role.DECIDE, Role.ADMIN},
    Need.READ: {Role.DECIDE, Role.ADMIN},
    Need.DECIDE: {Role.DECIDE, Role.ADMIN},
    Need.COLLECT: {Role.COLLECT, Role.ADMIN},
    Need.ADMIN: {Role.ADMIN},
    Need.CONSOLE: {Role.ADMIN},
}


@pytest.mark.parametrize("path", [*access.ROUTES, "/static_content/index.css"])
@pytest.mark.parametrize("role", [None, *Role])
def test_route_lets_in_exactly_those_it_is_declared_for(path, role):
    route = access.route_of(path)
    refusal = access.refuse(route, role, is_local=False)
    assert (refusal is None) == (role in ALLOWED[route.need])
    if refusal:
        assert refusal.status == (401 if role is None else 403)


def test_documentation_is_open_to_this_machine_only_and_decisions_never_are():
    for path in access.ROUTES:
        route = access.route_of(path)
        is_open = access.refuse(route, None, is_local=True) is None
        assert is_open == (route.need in (Need.NOTHING, Need.READ))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"/profile/ann", (access.PROFILE, "ann")),
        (b"/profile/ann%40example.com/export", (access.EXPORT, "ann@example.com")),
        (b"/profile/a%2Fb%2Fexport", (access.PROFILE, "a/b/export")),
        (b"/profile/export/erasure", (access.ERASURE, "export")),
        (b"/profile/%C3%BC", (access.PROFILE, "\u00fc")),
        (b"/profile/" + b"x" * 256, (access.PROFILE, "x" * 256)),
        (b"/profile/" + b"x" * 257, None),
        (b"/profile/" + b"%78" * 257, None),
        (b"/profile/%ff", None),
        (b"/profile/", None),
        (b"/profile//export", None),
        (b"/profile", None),
        (b"/profile/ann/", None),
        (b"/profile/ann/other", None),
        (b"/profile/ann/export/more", None),
        (b"/profile/ann/%65xport", None),
        (b"//profile/ann", None),
        (b"/Profile/ann", None),
        (b"/recommend", None),
    ],
)
def test_person_of_a_path_is_read_from_the_path_as_it_came(raw, expected):
    assert access.person_in(raw) == expected


@pytest.mark.parametrize(
    "path", ["", "/nothing", "/recommend/", "/RECOMMEND", "//recommend", "/static_content/../metrics", "/static_content"]
)
def test_undeclared_path_does_not_exist(path):
    assert access.route_of(path) is None


@pytest.mark.parametrize(
    ("host", "is_own"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.0.0.1", False), ("", False)],
)
def test_loopback_is_this_machine_alone(host, is_own):
    assert access.is_loopback(host) is is_own
