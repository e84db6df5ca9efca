"""Another master key for a home. In: the settings. Out: every key of the vault wrapped anew; pseudonyms and sealed cells stay as they are.

Both keys are kept until the vault is under the new one, so a crash at any point loses neither: doing it again ends it.
"""

import secrets
from contextlib import closing
from pathlib import Path

from pydantic import SecretStr

from pipelines.errors import InputError, StoreError
from pipelines.keyfile import kept
from pipelines.private_file import sync
from pipelines.settings import Settings
from pipelines.vault import MASTER, open_vault


def rotate(home: Path, *, settings: Settings) -> int:
    """Put the home under another master key: `next_master_key` where the settings hold the present one, else one made here.

    Returns the keys wrapped anew, 0 where an earlier run had come that far. What runs on this home reads on and makes no new keys until
    it is started again. Raises InputError where only one of the two keys is given, StoreError where neither opens the vault.
    """
    given, fresh = settings.master_key, settings.next_master_key
    if (given is None) != (fresh is None):
        raise InputError(
            "rotate-key: expected RAPPORT_MASTER_KEY and RAPPORT_NEXT_MASTER_KEY together, or neither where the key is in a file; "
            "found one; set or unset the other"
        )
    file = home / "keys" / MASTER
    waiting = file.with_name(f"{MASTER}.next")
    new = fresh or SecretStr(kept(waiting, lambda: secrets.token_urlsafe(32)))
    count = _wrapped(home, given, new)
    if fresh is None:
        waiting.replace(file)
        sync(file.parent)
    return count


def _wrapped(home: Path, given: SecretStr | None, new: SecretStr) -> int:
    try:
        vault = open_vault(home, master=given)
    except StoreError:
        open_vault(home, master=new).close()  # rotated, and ended before it could say so; raises where that is not it
        return 0
    with closing(vault):
        return vault.rotate(new.get_secret_value().encode())
