"""The service as a bento: built from the repository, started from what a home signed."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import pytest

from pipelines.settings import QUIET_ENVIRONMENT, Settings
from serving import access
from serving.access import Role

ROOT = Path(__file__).parents[2]
BENTO = ROOT / "deploy" / "bento"
PATIENCE_S = 180.0


def test_requirements_are_those_of_the_lock_file():
    locked = {package["name"]: package["version"] for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (BENTO / "requirements.txt").read_text(), re.MULTILINE))
    assert {"bentoml", "feast", "lightgbm"} <= set(pinned)
    stale = {name: version for name, version in pinned.items() if locked.get(name) != version}
    assert not stale, f"write deploy/bento/requirements.txt again, as {BENTO / 'bentofile.yaml'} says"
    (rapport,) = [package for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"] if package["name"] == "rapport"]
    assert {one["name"] for one in rapport["dependencies"]} <= set(pinned)


@pytest.mark.slow
def test_bento_starts_from_the_signed_models_of_a_home_and_answers(shop, cast, tmp_path, brokers):
    import bentoml

    bento = bentoml.bentos.build_bentofile(str(BENTO / "bentofile.yaml"), build_ctx=str(ROOT))  # as `bentoml build` does
    folder = Path(bento.path)
    assert {path.name for path in (folder / "src").iterdir()} >= {"serving", "pipelines", "models", "feature_repo"}
    assert not [path for path in folder.rglob("*") if path.suffix in (".key", ".db", ".lgb", ".npy") or path.name == "tests"]
    source = folder / "src" / "serving" / "service.py"
    source.write_text(source.read_text().replace('"title": "Rapport"', '"title": "Rapport as a bento"'))

    home = shutil.copytree(shop, tmp_path / "home", symlinks=True)
    access.ensure_keys(Settings(home=home))
    port = brokers.free_port()
    serve = [sys.executable, "-m", "bentoml", "serve", str(bento.tag), "--host", "127.0.0.1", "--port", str(port)]
    variables = os.environ | QUIET_ENVIRONMENT | {"RAPPORT_HOME": str(home), "RAPPORT_SERVING__DEADLINE_MS": "10000", "PYTHONPATH": ""}
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(serve, cwd=tmp_path, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            until = time.monotonic() + PATIENCE_S
            while time.monotonic() < until and child.poll() is None:
                with contextlib.suppress(httpx.HTTPError):
                    if http.get("/readyz").status_code == 200:
                        break
                time.sleep(0.2)
            bearer = {"Authorization": f"Bearer {access.read_key(Settings(home=home), Role.DECIDE)}"}
            answer = http.post("/churn", json={"customer_ids": [cast.customers[1]]}, headers=bearer).json()
            assert (answer["source"], answer["model_version"], answer["degraded"]) == ("personal", "1", False)
            assert http.get("/docs.json").json()["info"]["title"] == "Rapport as a bento"  # it runs what is in the bento
    finally:
        child.terminate()
        child.wait(60)
    assert all(json.loads(line)["logger"] for line in (tmp_path / "log").read_text().splitlines())
