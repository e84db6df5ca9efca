"""What Feast says of the online store, known without Feast: the views of each feature service, and that reading them directly is reading
them through it.

In: a home. Out: profiles. Importing Feast takes longer than all else of a start, and a third of a worker's memory. So it is asked in a
child process (`python -m serving.resolution HOME NICENESS [first]`), and what it said is kept in `serving/resolved.json` for as long as
nothing changes that it hangs on: Feast's version, its registry, the declarations, our reader, the address of the store. Before it is used,
rows that the store holds by now are read: their keys and values must be of the known encoding. Never keeps a verdict against the direct
read: then Feast itself reads.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import SecretStr

import feature_repo
from pipelines.online import feast_format
from pipelines.online import schema as online_schema
from pipelines.online.feast_format import Key, key_decoder, key_encoder
from pipelines.private_file import replace_file
from serving import online_store, profile
from serving.fallbacks import Deadline, Unavailable
from serving.online_store import EncodingChanged, Fast, SqliteSource, StoreFailure, View
from serving.profile import AGELESS, SELF_CHECK_ROWS, Profiles, Pseudonym

log = logging.getLogger("rapport.serving")

TIMEOUT_S = 120.0
_HANGS_ON = (feast_format, online_schema, online_store, profile)
_REDIS = Path(__file__).with_name("redis_source.py")  # imported where there is a Redis


class Resolver:
    """profile.open_profiles without Feast in this process, where it can be done without. One per worker, for its one watcher.

    Where nothing changed but the registry's history, which every materialization writes on, what was kept is used at once
    (`Profiles.is_provisional`) while Feast is asked beside it.
    """

    def __init__(self) -> None:
        self._beside: threading.Thread | None = None
        self._failed: str | None = None  # the stamp for which Feast itself has to read

    def __call__(self, home: Path, *, max_age_hours: float, pseudonym: Pseudonym, redis_url: SecretStr | None = None) -> Profiles:
        """The profiles. Raises StoreFailure."""
        declared, stamp = _stamps(home, redis_url)
        if stamp is not None and stamp != self._failed:
            told = _kept(home)
            is_provisional = told is not None and told.get("declared") == declared and told.get("stamp") != stamp
            if told is None or told.get("declared") != declared:
                told = _asked(home, declared, stamp, redis_url)
            found = None if told is None else _profiles(home, told, max_age_hours * 3600, pseudonym, redis_url)
            if found is not None:
                found.is_provisional = is_provisional
                if is_provisional:
                    self._ask_beside(home, declared, stamp, redis_url)
                return found
            self._failed = stamp
        return profile.open_profiles(home, max_age_hours=max_age_hours, pseudonym=pseudonym, redis_url=redis_url)

    def _ask_beside(self, home: Path, declared: str, stamp: str, redis_url: SecretStr | None) -> None:
        def ask() -> None:
            if _asked(home, declared, stamp, redis_url, is_urgent=False) is None:
                self._failed = stamp

        if self._beside is None or not self._beside.is_alive():
            self._beside = threading.Thread(target=ask, name="resolution", daemon=True)
            self._beside.start()


def keep(home: Path, *, redis_url: SecretStr | None = None) -> bool:
    """Ask Feast, in this process, and keep what it says; whether it was kept: not where Feast itself is to read. Raises StoreFailure."""
    declared, stamp = _stamps(home, redis_url)
    found = profile.open_profiles(home, max_age_hours=math.inf, pseudonym=lambda kind, name: name, redis_url=redis_url)
    if isinstance(found.source, online_store.FeastSource):
        return False
    views = {name: [_told(view) for view in some] for name, some in found.views.items()}
    path = found.source.path.relative_to(home.resolve()) if isinstance(found.source, SqliteSource) else ""
    replace_file(_path(home), json.dumps({"declared": declared, "stamp": stamp, "views": views, "path": str(path)}).encode())
    return True


def _profiles(home: Path, told: Mapping[str, Any], max_age_s: float, pseudonym: Pseudonym, redis_url: SecretStr | None) -> Profiles | None:
    """None where what was kept is no description of a store, or the store is not as described."""
    views = _views(told, max_age_s)
    if views is None:
        return None
    source = _source(home, told, redis_url)
    odd = oddity(source, views)
    if odd is not None:
        log.warning("online store: %s; asking Feast", odd)
        return None
    return Profiles(views, source, pseudonym=pseudonym)


def oddity(source: Fast, views: Mapping[str, tuple[View, ...]]) -> str | None:
    """What is not of the known encoding among some rows of each view; None for a sound store, and for one that does not answer now."""
    try:
        for view in {view.name: view for some in views.values() for view in some}.values():
            stored = source.some_keys(view, SELF_CHECK_ROWS)
            keys: list[Key] = [key_decoder(view.join_key)(key) for key in stored]
            if [key_encoder(view.join_key)(key) for key in keys] != stored:
                return f"{view.name}: the encoding of keys is not the one expected"
            source.fetch(view, keys, Deadline.after_ms(1_000))
    except (EncodingChanged, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    except (StoreFailure, Unavailable) as error:
        log.warning("online store: not looked at (%s); what is known of it is used", error)
    return None


# -- private -----------------------------------------------------------------------------------------------------------


def _path(home: Path) -> Path:
    return home / "serving" / "resolved.json"


def _stamps(home: Path, redis_url: SecretStr | None) -> tuple[str, str | None]:
    """Of all that the answer hangs on but the registry, and with it; None where there is no registry to ask."""
    found = hashlib.sha256(metadata.version("feast").encode())
    declared = sorted(path for path in Path(feature_repo.__file__).parent.iterdir() if path.suffix in (".py", ".yaml"))
    for path in (*declared, *(Path(str(module.__file__)) for module in (*_HANGS_ON, sys.modules[__name__])), _REDIS):
        found.update(path.read_bytes())
    found.update(b"" if redis_url is None else redis_url.get_secret_value().encode())
    without = found.hexdigest()
    try:
        found.update((home / "feature_store" / "registry.db").read_bytes())
    except OSError:
        return without, None
    return without, found.hexdigest()


def _kept(home: Path) -> dict[str, Any] | None:
    try:
        told = json.loads(_path(home).read_bytes())
        return told if isinstance(told, dict) else None
    except (OSError, ValueError):
        return None


def _asked(home: Path, declared: str, stamp: str, redis_url: SecretStr | None, *, is_urgent: bool = True) -> dict[str, Any] | None:
    """What a child process was told by Feast, kept for the next start; None where the direct read cannot be used, or nothing was told."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    url = "" if redis_url is None else redis_url.get_secret_value()  # by its input: arguments are for all to see
    command = [sys.executable, "-m", __name__, str(home.resolve()), "0" if is_urgent else "10"]
    try:
        with _alone(home):  # one worker asks for all
            told = _kept(home)
            if told is not None and told.get("stamp") == stamp:
                return told
            subprocess.run(
                command, env=os.environ | {"PYTHONPATH": path}, input=url.encode(), capture_output=True, timeout=TIMEOUT_S, check=False
            )
            told = _kept(home)
            return told if told is not None and told.get("stamp") == stamp else None
    except (OSError, subprocess.TimeoutExpired) as error:  # also a home that cannot be written to
        log.warning("feature store: it could not be resolved in a process of its own (%s)", type(error).__name__)
        return None


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Nobody else asks for this home inside."""
    _path(home).parent.mkdir(exist_ok=True)
    with _path(home).with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _views(told: Mapping[str, Any], max_age_s: float) -> dict[str, tuple[View, ...]] | None:
    """The views; None where these are none."""
    try:
        return {name: tuple(_view(one, name, max_age_s) for one in some) for name, some in told["views"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("feature store: what was resolved is not what was kept (%s); asking Feast", type(error).__name__)
        return None


def _view(told: Mapping[str, Any], name: str, max_age_s: float) -> View:
    if not re.fullmatch(r"\w+", told["table"], re.ASCII):  # it becomes a part of statements
        raise ValueError("a table's name is expected to be letters, digits and _")
    join_key = told["join_key"]
    key = join_key if isinstance(join_key, str) else tuple(join_key)
    most = math.inf if name in AGELESS else max_age_s
    ttl_s = told["max_age_s"]
    return View(told["name"], told["table"], key, tuple(told["columns"]), min(most, math.inf if ttl_s is None else ttl_s))


def _told(view: View) -> dict[str, Any]:
    return {**asdict(view), "max_age_s": None if math.isinf(view.max_age_s) else view.max_age_s}


def _source(home: Path, told: Mapping[str, Any], redis_url: SecretStr | None) -> Fast:
    if redis_url is not None:
        from serving import redis_source

        return redis_source.RedisSource(redis_url.get_secret_value())
    return SqliteSource((home.resolve() / told["path"]).resolve())


if __name__ == "__main__":
    os.nice(int(sys.argv[2]))
    _url = sys.stdin.read()
    _home, _redis_url = Path(sys.argv[1]), SecretStr(_url) if _url else None
    if sys.argv[3:] == ["first"]:  # before anybody waits for it; a worker that does finds the lock taken
        signal.alarm(int(TIMEOUT_S))
        with _alone(_home):
            if _kept(_home) is None:
                keep(_home, redis_url=_redis_url)
    else:
        keep(_home, redis_url=_redis_url)
