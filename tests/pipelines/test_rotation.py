"""Another master key: all that was readable stays so, under the new one alone, wherever the process died."""

from contextlib import closing

import pytest
from pydantic import SecretStr

from pipelines import rotation
from pipelines.errors import InputError, StoreError
from pipelines.settings import Settings
from pipelines.vault import Vault, open_vault

ANNA = "user_id:anna"


@pytest.fixture
def home(tmp_path):
    with closing(open_vault(tmp_path)) as vault:
        (tmp_path / "sealed").write_bytes(vault.seal([ANNA], [b"secret"])[0])
    return tmp_path


def opens(home, master=None):
    with closing(open_vault(home, master=master)) as vault:
        return vault.unseal([ANNA], [(home / "sealed").read_bytes()]) == [b"secret"]


def test_the_file_holds_another_key_and_the_old_one_opens_nothing(home):
    before = (home / "keys" / "master.key").read_text()
    assert rotation.rotate(home, settings=Settings(home=home)) == 2  # of the pseudonyms and of Anna
    assert (home / "keys" / "master.key").read_text() != before
    assert opens(home)
    with pytest.raises(StoreError, match="another master key"):
        open_vault(home, master=SecretStr(before))


@pytest.mark.parametrize("dies_at", ["before the vault is written", "before the file is replaced"])
def test_a_run_that_died_is_ended_by_the_next(home, monkeypatch, dies_at):
    with monkeypatch.context() as patch:
        if dies_at == "before the vault is written":
            patch.setattr(Vault, "rotate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            patch.setattr(rotation.Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rotation.rotate(home, settings=Settings(home=home))
    count = rotation.rotate(home, settings=Settings(home=home))
    assert count == (2 if dies_at == "before the vault is written" else 0)
    assert opens(home)
    assert not (home / "keys" / "master.key.next").exists()


def test_keys_of_the_settings_are_used_as_a_pair(tmp_path):
    old, new = SecretStr("old"), SecretStr("new")
    with closing(open_vault(tmp_path, master=old)) as vault:
        (tmp_path / "sealed").write_bytes(vault.seal([ANNA], [b"secret"])[0])
    for only in ({"master_key": old}, {"next_master_key": new}):
        with pytest.raises(InputError, match="together"):
            rotation.rotate(tmp_path, settings=Settings(home=tmp_path, **only))
    both = Settings(home=tmp_path, master_key=old, next_master_key=new)
    assert rotation.rotate(tmp_path, settings=both) == 2
    assert rotation.rotate(tmp_path, settings=both) == 0  # done before
    assert opens(tmp_path, new)
    assert not (tmp_path / "keys").exists()


def test_a_vault_of_neither_key_is_left_as_it_is(home):
    given = Settings(home=home, master_key=SecretStr("a"), next_master_key=SecretStr("b"))
    with pytest.raises(StoreError, match="another master key"):
        rotation.rotate(home, settings=given)
    assert opens(home)
