import json
import os
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest

from pipelines import registry
from pipelines.errors import RegistryError


class Scale:
    """A learner of one number, saved as text and an array."""

    def __init__(self, factor=2.0):
        self.factor = factor

    def save(self, folder):
        (folder / "native").mkdir()
        (folder / "native" / "factor.txt").write_text(str(self.factor))
        np.save(folder / "weights.npy", np.arange(3.0))


def stored(home, factor=2.0, **manifest):
    return registry.register(home, "churn", learner=Scale(factor), manifest={"metric": "auc", **manifest})


def folder_of(home, version):
    return home / "models" / "churn" / str(version)


def test_registered_version_is_loaded_with_its_files_and_manifest(tmp_path):
    ids = np.array(["c1", "customer-22"], dtype=object)
    version = registry.register(
        tmp_path, "churn", learner=Scale(), arrays={"customer_ids": ids}, manifest={"metric": "auc", "by": {1: (1, 2)}}
    )
    found = registry.load_version(tmp_path, "churn", version)
    assert (found.name, found.version, found.folder) == ("churn", 1, folder_of(tmp_path, 1))
    assert found.manifest["metric"] == "auc"
    assert found.manifest["by"] == {"1": [1, 2]}
    assert set(found.manifest["files"]) == {"native/factor.txt", "weights.npy", "customer_ids.npy"}
    kept = np.load(found.folder / "customer_ids.npy", allow_pickle=False)
    assert kept.tolist() == ids.tolist()
    assert kept.dtype.kind == "U"


def test_nobody_is_champion_before_promotion(tmp_path):
    stored(tmp_path)
    with pytest.raises(RegistryError, match="no champion"):
        registry.load_champion(tmp_path, "churn")


def test_flipping_any_one_byte_anywhere_is_refused(tmp_path):
    registry.promote(tmp_path, "churn", stored(tmp_path))
    files = [path for path in folder_of(tmp_path, 1).rglob("*") if path.is_file()]
    assert len(files) == 3
    for path in files:
        whole = path.read_bytes()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << (position % 8)
            path.write_bytes(damaged)
            with pytest.raises(RegistryError):
                registry.load_champion(tmp_path, "churn")
        path.write_bytes(whole)
    assert registry.load_champion(tmp_path, "churn").version == 1  # control: undamaged it loads


@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign file", "link", "no manifest", "rewritten manifest"])
def test_version_with_other_files_than_registered_is_refused(tmp_path, damage):
    registry.promote(tmp_path, "churn", stored(tmp_path))
    folder = folder_of(tmp_path, 1)
    weights, manifest = folder / "weights.npy", folder / "manifest.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "missing":
        weights.unlink()
    elif damage == "foreign file":
        (folder / "extra.lgb").write_text("tree")
    elif damage == "link":
        weights.rename(tmp_path / "elsewhere.npy")
        weights.symlink_to(tmp_path / "elsewhere.npy")
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text())))  # same values, other bytes
    with pytest.raises(RegistryError):
        registry.load_champion(tmp_path, "churn")


def test_manifest_that_lists_the_hash_of_a_changed_file_is_refused_without_the_key(tmp_path):
    registry.promote(tmp_path, "churn", stored(tmp_path))
    folder = folder_of(tmp_path, 1)
    (folder / "native" / "factor.txt").write_text("9")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["native/factor.txt"] = registry._digest(folder / "native" / "factor.txt")
    (folder / "manifest.json").write_text(json.dumps(manifest, sort_keys=True, indent=1))
    with pytest.raises(RegistryError, match="not what this home signed"):
        registry.load_champion(tmp_path, "churn")


def test_version_of_another_home_is_refused_even_in_the_right_place(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    stored(there)
    stored(here)
    shutil.rmtree(folder_of(here, 1))
    shutil.copytree(folder_of(there, 1), folder_of(here, 1))
    with pytest.raises(RegistryError, match="another home"):
        registry.promote(here, "churn", 1)
    shutil.copy(there / "keys" / "signing.key", here / "keys" / "signing.key")
    registry.promote(here, "churn", 1)  # control: with that home's key it is sound


@pytest.mark.parametrize("content", ["", "no hex", "ab" * 8])
def test_spoiled_signing_key_is_refused(tmp_path, content):
    registry.promote(tmp_path, "churn", stored(tmp_path))
    (tmp_path / "keys" / "signing.key").write_text(content)
    with pytest.raises(RegistryError):
        registry.load_champion(tmp_path, "churn")


def test_reading_with_the_key_gone_is_refused_and_makes_no_new_key(tmp_path):
    registry.promote(tmp_path, "churn", stored(tmp_path))
    (tmp_path / "keys" / "signing.key").unlink()
    with pytest.raises(RegistryError, match="signing key"):
        registry.load_champion(tmp_path, "churn")
    assert not (tmp_path / "keys" / "signing.key").exists()


def test_old_version_moved_under_a_new_number_is_refused(tmp_path):
    stored(tmp_path)
    registry.promote(tmp_path, "churn", stored(tmp_path, 3.0))
    shutil.rmtree(folder_of(tmp_path, 2))
    shutil.copytree(folder_of(tmp_path, 1), folder_of(tmp_path, 2))
    with pytest.raises(RegistryError, match="moved"):
        registry.load_champion(tmp_path, "churn")


def test_signing_key_is_readable_by_its_owner_alone(tmp_path):
    stored(tmp_path)
    assert stat.S_IMODE((tmp_path / "keys" / "signing.key").stat().st_mode) == 0o600


def test_same_training_key_is_the_same_version_and_another_key_a_new_one(tmp_path):
    assert stored(tmp_path, training_key="a") == 1
    assert stored(tmp_path, training_key="a") == 1
    assert stored(tmp_path, training_key="b") == 2
    (folder_of(tmp_path, 1) / "weights.npy").unlink()
    assert stored(tmp_path, training_key="a") == 3  # the damaged version does not count


def test_interrupted_registration_leaves_no_version(tmp_path):
    class Breaks(Scale):
        def save(self, folder):
            super().save(folder)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        registry.register(tmp_path, "churn", learner=Breaks(), manifest={})
    assert registry.versions(tmp_path, "churn") == ()
    assert list((tmp_path / "models" / "churn").iterdir()) == []


def test_where_no_version_is_the_next_step_is_told(tmp_path):
    for ask in (lambda: registry.promote(tmp_path, "churn", 3), lambda: registry.rollback(tmp_path, "churn")):
        with pytest.raises(RegistryError, match=r"no (version 3|champion yet).*; it has none, so train it first"):
            ask()
    stored(tmp_path, 1.0)
    stored(tmp_path, 2.0)
    with pytest.raises(RegistryError, match=r"no version 3 under .*; it has 1, 2$"):
        registry.promote(tmp_path, "churn", 3)


def test_rollback_returns_to_the_champion_before_and_promotion_forward_again(tmp_path):
    for factor in (1.0, 2.0, 3.0):
        registry.promote(tmp_path, "churn", stored(tmp_path, factor))
    assert registry.champions(tmp_path)["churn"]["previous"] == 2
    assert registry.rollback(tmp_path, "churn") == 2
    entry = registry.champions(tmp_path)["churn"]
    assert (entry["version"], entry["previous"], entry["rolled_back"]) == (2, 1, [3])
    assert registry.rollback(tmp_path, "churn") == 1
    with pytest.raises(RegistryError, match="no champion before version 1"):
        registry.rollback(tmp_path, "churn")
    registry.promote(tmp_path, "churn", 3)
    entry = registry.champions(tmp_path)["churn"]
    assert (entry["version"], entry["previous"], entry["rolled_back"]) == (3, 1, [2])


def test_promotion_of_an_unknown_or_damaged_version_leaves_the_champion(tmp_path):
    registry.promote(tmp_path, "churn", stored(tmp_path))
    damaged = stored(tmp_path, 3.0)
    (folder_of(tmp_path, damaged) / "weights.npy").write_bytes(b"")
    for version in (damaged, 99):
        with pytest.raises(RegistryError):
            registry.promote(tmp_path, "churn", version)
    assert registry.load_champion(tmp_path, "churn").version == 1


def test_name_that_would_leave_the_folder_is_refused(tmp_path):
    with pytest.raises(RegistryError, match="letters, digits"):
        registry.load_version(tmp_path, "../keys", 1)


def test_untrainable_model_says_why_and_a_standing_champion_stays(tmp_path):
    registry.mark_untrainable(tmp_path, "intent", "no views", 0.1)
    entry = registry.champions(tmp_path)["intent"]
    assert (entry["version"], entry["previous"], entry["why"], entry["prior"]) == (None, None, "no views", 0.1)
    with pytest.raises(RegistryError, match="no views"):
        registry.load_champion(tmp_path, "intent")
    registry.promote(tmp_path, "churn", stored(tmp_path))
    registry.mark_untrainable(tmp_path, "churn", "too short", None)
    assert registry.load_champion(tmp_path, "churn").version == 1
    assert set(registry.champions(tmp_path)) == {"churn", "intent"}


def test_interrupted_replacement_leaves_the_old_champions(tmp_path, monkeypatch):
    registry.promote(tmp_path, "churn", stored(tmp_path))
    newer = stored(tmp_path, 3.0)

    def die(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", die)
        with pytest.raises(KeyboardInterrupt):
            registry.promote(tmp_path, "churn", newer)
    assert registry.load_champion(tmp_path, "churn").version == 1
    registry.promote(tmp_path, "churn", newer)
    assert registry.load_champion(tmp_path, "churn").version == newer


@pytest.mark.parametrize("content", ["", "[]", "{", '{"churn": 3}', '{"churn": {"version": "../churn/1"}}', '{"churn": {"version": true}}'])
def test_spoiled_list_of_champions_is_refused(tmp_path, content):
    registry.promote(tmp_path, "churn", stored(tmp_path))
    (tmp_path / "models" / "champions.json").write_text(content)
    with pytest.raises(RegistryError):
        registry.load_champion(tmp_path, "churn")


def test_reading_a_champion_imports_neither_mlflow_nor_a_native_loader(tmp_path):
    registry.promote(tmp_path, "churn", stored(tmp_path))
    script = (
        "import sys; from pathlib import Path; from pipelines import registry;"
        f"registry.load_champion(Path({str(tmp_path)!r}), 'churn');"
        "print([m for m in ('mlflow', 'lightgbm', 'implicit', 'feast', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.strip() == "[]"


def halve(folder, manifest):
    (folder / "native" / "factor.txt").write_text("1.0")
    np.save(folder / "weights.npy", np.arange(2.0))
    return {"metric": "half"}


def test_amended_version_has_its_new_content_under_its_old_number_and_says_why(tmp_path):
    registry.promote(tmp_path, "churn", stored(tmp_path, training_key="a"))
    mapped = np.load(folder_of(tmp_path, 1) / "weights.npy", mmap_mode="r")
    amended = registry.amend(tmp_path, "churn", 1, why="erasure", change=halve)
    assert amended == registry.load_champion(tmp_path, "churn")
    assert (amended.version, amended.manifest["metric"], amended.manifest["amendments"]) == (1, "half", [{"why": "erasure"}])
    assert (amended.folder / "native" / "factor.txt").read_text() == "1.0"
    assert mapped.tolist() == [0.0, 1.0, 2.0]  # who reads the old files still does
    assert registry.champions(tmp_path)["churn"]["amended"] == 1
    assert registry.find(tmp_path, "churn", training_key="a") == 1
    assert [path.name for path in (tmp_path / "models" / "churn").iterdir()] == ["1"]


def test_amendment_that_changes_nothing_leaves_every_byte(tmp_path):
    stored(tmp_path)
    before = {path: path.stat().st_ino for path in folder_of(tmp_path, 1).rglob("*")}
    assert registry.amend(tmp_path, "churn", 1, why="erasure", change=lambda folder, manifest: None) is None
    assert {path: path.stat().st_ino for path in folder_of(tmp_path, 1).rglob("*")} == before


def test_unsound_version_is_not_signed_by_an_amendment(tmp_path):
    stored(tmp_path)
    (folder_of(tmp_path, 1) / "weights.npy").write_bytes(b"")
    with pytest.raises(RegistryError):
        registry.amend(tmp_path, "churn", 1, why="erasure", change=halve)


@pytest.mark.parametrize("moves", [0, 1])
def test_amendment_killed_between_its_moves_is_mended_by_the_next(tmp_path, monkeypatch, moves):
    registry.promote(tmp_path, "churn", stored(tmp_path))
    rename, done = type(tmp_path).rename, []

    def die(self, target):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", die)
        with pytest.raises(KeyboardInterrupt):
            registry.amend(tmp_path, "churn", 1, why="erasure", change=halve)
    registry.amend(tmp_path, "churn", 1, why="erasure", change=halve)
    assert registry.load_champion(tmp_path, "churn").manifest["metric"] == "half"
    assert [path.name for path in (tmp_path / "models" / "churn").iterdir()] == ["1"]
