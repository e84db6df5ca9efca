"""An XML file -> its row elements as tables of text columns, read piece by piece in constant memory.

In: a file and the name of the element that is one row. Out: one column for each attribute and child element; what lies one
level deeper is `child.name`. A document that declares its own grammar or entities is refused: nothing is expanded or fetched.
"""

import gzip
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path

import pyarrow as pa
from lxml import etree

from pipelines.errors import InputError

Row = tuple[dict[str, str | None], str]  # the cells by column, and the element as text


def read_elements(path: Path, row: str, *, batch_rows: int) -> Iterator[pa.Table]:
    """The elements named `row`, in whatever namespace, at most `batch_rows` at a time, with `__raw` and `__row` (1-based).

    An element that is there twice within a row counts the first time. Raises InputError for a file that is no such document.
    """
    opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115  (closed below)
    first = count(1)
    try:
        with opened:
            rows = _rows(opened, path, row)
            while piece := list(islice(rows, batch_rows)):
                cells, raw = zip(*piece, strict=True)
                shape = pa.struct([(name, pa.string()) for name in dict.fromkeys(chain.from_iterable(cells))])
                columns = dict(zip((field.name for field in shape), pa.array(cells, shape).flatten(), strict=True))
                yield pa.table(
                    columns | {"__raw": pa.array(raw, pa.string()), "__row": pa.array(list(islice(first, len(raw))), pa.int64())}
                )
    except (etree.XMLSyntaxError, EOFError, OSError) as error:
        raise InputError(f"sources: expected XML in {path}, found something else ({str(error).splitlines()[0]}); mend the file") from error


def _rows(opened: object, path: Path, name: str) -> Iterator[Row]:
    safe = {"resolve_entities": False, "load_dtd": False, "no_network": True, "huge_tree": False}
    found = etree.iterparse(opened, events=("end",), tag=f"{{*}}{name}", remove_comments=True, remove_pis=True, **safe)
    is_checked = False
    for _, element in found:
        if not is_checked:
            _check_plain(element, path)
            is_checked = True
        text = etree.tostring(element, encoding="unicode", with_tail=False)
        yield _cells(element, text), text
        _forget(element)


def _check_plain(element: etree._Element, path: Path) -> None:
    if element.getroottree().docinfo.internalDTD is not None:
        raise InputError(f"sources: expected plain XML in {path}, found a DOCTYPE; entities are never expanded: remove the declaration")


def _cells(element: etree._Element, text: str) -> dict[str, str | None]:
    """The cells of a row. Most have no attributes or namespaces: looking for them takes longer than all the rest."""
    cells: dict[str, str | None] = {}
    if "=" not in text:
        for child in element:
            if len(child):
                break
            cells.setdefault(child.tag, child.text)
        else:
            return cells
    return _all_cells(element)


def _all_cells(element: etree._Element) -> dict[str, str | None]:
    cells: dict[str, str | None] = {_plain(name): value for name, value in element.items()}
    for child in element:
        name = _plain(child.tag)
        cells.setdefault(name, child.text)
        for inner, value in child.items():
            cells.setdefault(f"{name}.{_plain(inner)}", value)
        for grandchild in child:
            cells.setdefault(f"{name}.{_plain(grandchild.tag)}", grandchild.text)
    return cells


def _plain(name: str) -> str:
    return name.rpartition("}")[2]


def _forget(element: etree._Element) -> None:
    """Free the element, and what lies before it in the document."""
    element.clear()
    node: etree._Element | None = element
    while node is not None:
        parent = node.getparent()
        while parent is not None and node.getprevious() is not None:
            del parent[0]
        node = parent
