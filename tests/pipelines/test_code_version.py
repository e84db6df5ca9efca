"""The hash of a step's code moves with what it runs, and with nothing else."""

import textwrap

import pytest

from pipelines import flow
from pipelines.code_version import ROOT, _files, _read, code_version

FILES = {
    "shop/__init__.py": "",
    "shop/till.py": """
        '''Counts money.'''
        from shop import coins


        def count(box):
            from shop.deep import rules  # when it is needed

            return coins.total(box) + rules.ROUND
        """,
    "shop/coins.py": "def total(box):\n    return sum(box)\n",
    "shop/deep/__init__.py": "import json\n",
    "shop/deep/rules.py": "ROUND = 1\n",
    "shop/window.py": "LIGHT = True\n",
    "parts/__init__.py": "",
    "parts/found.py": "X = 1\n",
}


@pytest.fixture
def shop(tmp_path):
    def write(**changed):
        for name, text in (
            FILES | {f"{key.replace('__', '/').replace('INIT', '__init__')}.py": text for key, text in changed.items()}
        ).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        code_version.cache_clear()
        _read.cache_clear()
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("changed", "is_other"),
    [
        ({"shop__coins": "def total(box):\n    return max(box)\n"}, True),
        ({"shop__deep__rules": "ROUND = 2\n"}, True),
        ({"shop__deep__INIT": "import os\n"}, True),
        ({"parts__found": "X = 2\n"}, True),
        ({"parts__new": "Y = 1\n"}, True),
        ({"shop__window": "LIGHT = False\n"}, False),
        ({"shop__coins": "def total(box):  # of coins\n    '''All of it.'''\n\n    return sum( box )\n"}, False),
    ],
    ids=["imported", "imported inside", "package around", "package named", "file added", "not imported", "comment"],
)
def test_hash_moves_with_the_code_that_is_run_and_nothing_else(shop, changed, is_other):
    names = ("shop.till", "parts")
    before = code_version(names, shop())
    assert code_version(names, shop()) == before
    assert (code_version(names, shop(**changed)) != before) is is_other


def test_modules_of_every_step_are_there():
    for step in flow.STEPS:
        assert step.code, step.name
        for name in step.code:
            assert _files(name, ROOT), f"{step.name} names {name}"
