"""The tables `items`, `interactions` and `customer_segments` -> the catalogue that answers are made with."""

from datetime import datetime
from pathlib import Path

from models.shop.catalogue import Catalogue, catalogue
from pipelines import tables
from serving.interest import read_interest


def load(home: Path, *, at: datetime) -> Catalogue:
    """The catalogue as the tables hold it now; empty where nothing was ingested."""
    segments = tables.read(home, tables.CUSTOMER_SEGMENTS, ["customer_id", "event_timestamp", "segment", "lifecycle"])
    return catalogue(tables.read(home, tables.ITEMS), read_interest(home), segments, at=at)


def stamp(home: Path) -> tuple[str, ...]:
    """Changes whenever `load` would read other rows."""
    read = (tables.ITEMS, tables.INTERACTIONS, tables.CUSTOMER_SEGMENTS)
    return tuple(str(tables.folder(home, table).resolve()) for table in read)
