"""Same data, same seed, two processes: the same artifacts to the byte, but for what `DIFFERS` lists."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipelines import registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
NAMES = ("churn", "recommender", "segments")
DIFFERS = {
    "signature",  # by the key of each home
    "git.commit",  # of the code, where somebody commits in between
    "code.dirty",
}

TRAIN = textwrap.dedent(
    """
    import sys
    from datetime import datetime
    from pathlib import Path

    from pipelines.settings import Settings, silence_telemetry

    if __name__ == "__main__":
        silence_telemetry()
        home, settings, as_of, *names = sys.argv[1:]
        from pipelines import training

        for name in names:
            known = Settings.model_validate_json(settings).model_copy(update={"home": Path(home)})
            training.train(name, Path(home), settings=known, as_of=datetime.fromisoformat(as_of))
    """
)


def artifacts(home, name):
    """The files of version 1, by their names, as they are; of the manifest what must not differ."""
    folder = home / "models" / name / "1"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = json.loads(found.pop(registry.MANIFEST))
    return found, {key: value for key, value in manifest.items() if key not in DIFFERS}, manifest["signature"]


def test_another_process_makes_the_same_artifacts_to_the_byte(segmented, empty_tracking, tmp_path):
    home, settings, _, as_of = segmented
    other = tmp_path / "other"
    shutil.copytree(home, other, symlinks=True, ignore=shutil.ignore_patterns("models", "optuna", "mlflow", "signing.key"))
    shutil.copytree(empty_tracking, other / "mlflow")
    words = [str(other), settings.model_dump_json(), as_of.isoformat(), *NAMES]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", TRAIN, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    for name in NAMES:
        (here, manifest, signature), (there, other_manifest, other_signature) = artifacts(home, name), artifacts(other, name)
        assert len(here) >= 2
        assert {file: len(content) for file, content in here.items()} == {file: len(content) for file, content in there.items()}
        assert [file for file in here if here[file] != there[file]] == [], name
        assert manifest == other_manifest, name
        assert signature != other_signature  # control: two homes, and a difference is seen
