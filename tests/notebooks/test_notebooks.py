"""The notebooks: one after another on one small home, as a data scientist would run them; stored without outputs, and defining nothing."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from pipelines.vault import open_vault

FOLDER = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.stem for path in PATHS]
CELL_TIMEOUT_S = 600
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("shop") / "home"
    open_vault(home).close()  # whose names are the same in every run: in which order people come decides a little of what is learned
    return home


@pytest.fixture(scope="module")
def executed(home: Path, guarded: dict[str, str]) -> Iterator[dict[str, nbformat.NotebookNode]]:
    """By name, each notebook with its outputs. One kernel for all, emptied in between: what is imported need not be imported again."""
    scratch = home.parent
    own = {"RAPPORT_HOME": str(home), "IPYTHONDIR": str(scratch / "ipython"), "MPLCONFIGDIR": str(scratch / "matplotlib")}
    # sockets in a folder, no ports; a short name, since the path of a socket may not be long
    kernel = KernelManager(transport="ipc", connection_file=str(scratch / "k"))
    kernel.start_kernel(env={**guarded, **own}, cwd=str(FOLDER))
    books = {}
    try:
        for path in PATHS:
            book = nbformat.read(path, as_version=4)
            book.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
            client = NotebookClient(book, km=kernel, timeout=CELL_TIMEOUT_S)
            client.execute()
            client.kc.stop_channels()
            books[path.stem] = book
        yield books
    finally:
        kernel.shutdown_kernel(now=True)


def _code(book: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


def _told(book: nbformat.NotebookNode) -> str:
    """Everything that the cells wrote or showed, as text."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    return "\n".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)


def _definitions(sources: list[str]) -> list[str]:
    nodes = (node for source in sources for node in ast.walk(ast.parse(source)))
    return [f"{type(node).__name__} in line {node.lineno}" for node in nodes if isinstance(node, DEFINITIONS)]


def test_the_notebooks_follow_the_path() -> None:
    assert NAMES == ["01_events_to_features", "02_train_and_compare", "03_recommendations"]


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_notebook_imports_everything_and_defines_nothing(path: Path) -> None:
    assert not _definitions(_code(nbformat.read(path, as_version=4)))


@pytest.mark.parametrize("planted", ["def f():\n    return 1", "class A:\n    x = 1", "twice = lambda x: 2 * x", "[(lambda: 1)()]"])
def test_a_planted_definition_is_found(planted: str) -> None:
    assert len(_definitions(["x = [y for y in range(3)]", planted])) == 1


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_notebook_is_stored_without_outputs_in_the_one_way_to_write_it(path: Path) -> None:
    book = json.loads(path.read_text())
    nbformat.validate(nbformat.from_dict(book))
    for cell in book["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    assert [cell["id"] for cell in book["cells"]] == [f"cell-{n:02d}" for n in range(1, len(book["cells"]) + 1)]
    assert path.read_text() == json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_to_its_end_and_draws(executed: dict[str, nbformat.NotebookNode], name: str) -> None:
    outputs = [output for cell in executed[name].cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert sum("text/html" in output.get("data", {}) for output in outputs) >= 2  # tables


@pytest.mark.slow
def test_the_notebooks_tell_what_they_promise(executed: dict[str, nbformat.NotebookNode]) -> None:
    events, churn, lists = (_told(executed[name]) for name in NAMES)
    for words in ("consent_dropped", "reason", "purchases_30d", "last_purchase_age_days"):
        assert words in events
    for words in ("logistic regression", "Pareto/NBD", "hazard", "ahead by", "against version 1", "no group worse", "rolled back"):
        assert words in churn
    for words in ("own history", "first stage", "coverage@", "novelty_bits@", "own_history", "reason"):
        assert words in lists


@pytest.mark.slow
def test_everything_is_written_below_the_home_and_nothing_leaves_the_machine(
    executed: dict[str, nbformat.NotebookNode], home: Path, guarded: dict[str, str]
) -> None:
    assert {path.suffix for path in FOLDER.iterdir()} - {".rapport", ".ipynb_checkpoints"} == {".ipynb", ".env"}
    assert {"tables", "models", "mlflow"} <= {path.name for path in home.iterdir()}
    assert Path(guarded["CONNECTIONS_LOG"]).read_text() == ""
