"""The small shop of tests/pipelines, with its segments."""

import shutil

import pytest

from pipelines import training


@pytest.fixture(scope="session")
def segmented(trained, tmp_path_factory):
    """A home with trained segments beside the other models, and the report of their training."""
    home = tmp_path_factory.mktemp("segmented") / "home"
    shutil.copytree(trained.home, home, symlinks=True)
    settings = trained.settings.model_copy(update={"home": home})
    return home, settings, training.train("segments", home, settings=settings, as_of=trained.as_of), trained.as_of
