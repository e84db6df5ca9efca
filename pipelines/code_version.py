"""Names of modules -> a hash of their code and of all of ours that they import: other code, other hash.

Comments, docstrings and layout make no difference. What is imported inside a function counts as well; what is found by looking through
a package does where the package is named. Never imports what it reads.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def code_version(modules: tuple[str, ...], root: Path = ROOT) -> str:
    """SHA-256 of the code of these modules, of a package all its modules, and of what they import from under `root`."""
    found: dict[Path, str] = {}
    waiting = [path for name in modules for path in _files(name, root, is_whole=True)]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path], imported = _read(path)
            waiting += [file for name in imported for file in _files(name, root)]
    told = "".join(f"{path.relative_to(root).as_posix()} {code}\n" for path, code in sorted(found.items()))
    return hashlib.sha256(told.encode()).hexdigest()


# -- private -----------------------------------------------------------------------------------------------------------


def _files(name: str, root: Path, *, is_whole: bool = False) -> list[Path]:
    """The file of a module, and those of the packages around it, which are run with it; none where it is not ours."""
    parts = name.split(".")
    around = [root.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
    folder = root.joinpath(*parts)
    inside = sorted(folder.rglob("*.py")) if is_whole else []
    return [path for path in (*around, folder.with_suffix(".py"), *inside) if path.is_file()]


@cache
def _read(path: Path) -> tuple[str, tuple[str, ...]]:
    """The hash of a file's code, and the names that it imports."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    code = hashlib.sha256(ast.dump(tree).encode()).hexdigest()
    return code, tuple(name for node in ast.walk(tree) for name in _imported(node))


def _imported(node: ast.AST) -> Iterator[str]:
    """Names that may be those of modules: of `from a import b` both a and a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
