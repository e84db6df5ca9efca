"""The README names what is there: files, verbs with their options, and settings."""

import re
from pathlib import Path

from typer.main import get_command

import rapport
from pipelines.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OF_TESTS = {"RAPPORT_KILLS", "RAPPORT_SCHEDULES", "RAPPORT_FUZZ_S"}  # what makes the suite look longer
OF_PLACES = ("pipelines/", "serving/", "models/", "monitoring/", "feature_repo/", "notebooks/", "deploy/", "tests/", ".ci/")


def named(text: str) -> list[str]:
    """What is said to be a file or folder of the repository: a path, or the name alone of one beside a file named before."""
    return [name for name in re.findall(r"`([\w./-]+)`", text) if name.startswith(OF_PLACES) or re.fullmatch(r"\w+\.py", name)]


def is_there(name: str) -> bool:
    """Whether the repository has such a path, or such a file in some folder."""
    return (ROOT / name).exists() or ("/" not in name and any(any((ROOT / top).rglob(name)) for top in OF_PLACES))


def commands(text: str) -> list[list[str]]:
    """The words after `rapport` wherever a verb is shown, without what is only said of it."""
    shown = re.findall(r"(?:^|[`$ ])rapport ([a-z][^`#|;)\n]*)", "\n".join(_code(text)), re.MULTILINE)
    return [re.sub(r'\$\([^)]*\)|"[^"]*"', "X", line).split() for line in shown]


def _code(text: str) -> list[str]:
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"`(?:RAPPORT_\S+ )*(rapport [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def fault(words: list[str]) -> str | None:
    """What the command line would not know of these words."""
    command, at = get_command(rapport.app), 0
    while hasattr(command, "commands"):
        if at == len(words) or words[at] not in command.commands:
            return f"rapport {' '.join(words)}: no verb {words[at] if at < len(words) else 'at its end'}"
        command, at = command.commands[words[at]], at + 1
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    unknown = [word for word in words[at:] if word.startswith("--") and word not in known]
    return f"rapport {' '.join(words)}: no option {unknown[0]}" if unknown else None


def is_setting(variable: str) -> bool:
    """Whether the settings read this environment variable."""
    model = Settings
    *groups, last = variable.removeprefix("RAPPORT_").lower().split("__")
    for group in groups:
        field = model.model_fields.get(group)
        if field is None or not hasattr(field.annotation, "model_fields"):
            return False
        model = field.annotation
    return last in model.model_fields


def test_files_are_there():
    assert len(set(named(README))) > 60
    assert [name for name in named(README) if not is_there(name)] == []


def test_verbs_and_options_are_the_command_line_s():
    shown = commands(README)
    assert len(shown) > 30
    assert [said for said in map(fault, shown) if said] == []


def test_variables_are_settings():
    variables = set(re.findall(r"RAPPORT_[A-Z_]*[A-Z]", README)) - OF_TESTS
    assert len(variables) > 20
    assert sorted(name for name in variables if not is_setting(name)) == []


def test_what_is_not_there_is_found():
    assert [is_there(name) for name in named("`pipelines/tables/`, `runner.py`")] == [True, True]
    assert not any(is_there(name) for name in named("`nowhere.py`, `models/nowhere.py`"))
    assert fault(["features", "bake"]) == "rapport features bake: no verb bake"
    assert fault(["train", "churn", "--when", "84", "--why"]) == "rapport train churn --when 84 --why: no option --why"
    assert fault(["features"]) == "rapport features: no verb at its end"
    assert not any(map(is_setting, ("RAPPORT_TRAINING__LUCK", "RAPPORT_LUCK__TRIALS")))
