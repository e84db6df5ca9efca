import json

import pytest

from pipelines.commands import terminal

REPORT = {"log": {"accepted": 148_088, "pending": 0, "since": None}, "tables": {}, "names": ["a"], "note": "[bold]x", "is_whole": True}


def test_person_reads_a_column_under_its_name(capsys):
    terminal.show(REPORT, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "log:",
        "  accepted  148,088",
        "  pending         0",
        "  since        none",
        "tables: none",
        'names: ["a"]',
        "note: [bold]x",
        "is_whole: true",
    ]


def test_program_reads_one_object(capsys):
    terminal.show(REPORT, as_json=True)
    assert json.loads(capsys.readouterr().out) == REPORT


@pytest.mark.parametrize("rows", [[], [{"name": "a", "n": 1}]], ids=["none", "one"])
def test_rows_are_a_table_or_an_object(rows, capsys):
    terminal.show_rows(rows, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"rows": rows}
    terminal.show_rows(rows, as_json=False)
    assert capsys.readouterr().out.split() == (["name", "n", "a", "1"] if rows else ["none"])
