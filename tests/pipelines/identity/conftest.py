"""People with known truth: FEBRL's records, read as what customers tell of themselves."""

from pathlib import Path

import pandas as pd
import pytest


@pytest.fixture(scope="session")
def febrl(shared_data: Path) -> dict[int, pd.DataFrame]:
    """Datasets 1, 2 and 3: identifier, person (the truth), and fields as `linkage.link` takes them."""
    return {number: _read(shared_data / "febrl" / f"dataset{number}.csv.gz") for number in (1, 2, 3)}


def _read(path: Path) -> pd.DataFrame:
    rows = pd.read_csv(path, sep=r",\s*", engine="python", dtype="str", keep_default_na=False).map(str.strip)
    street = (rows["street_number"] + " " + rows["address_1"]).str.strip()
    told = pd.DataFrame(
        {
            "identifier": "user_id:" + rows["rec_id"],
            "person": rows["rec_id"].str.extract(r"rec-(\d+)-")[0],
            "first_name": rows["given_name"],
            "last_name": rows["surname"],
            "street": street,
            "address": rows["address_2"],
            "city": rows["suburb"],
            "postcode": rows["postcode"],
            "date_of_birth": rows["date_of_birth"],
        },
        dtype="object",
    )
    return told.mask(told == "", None)
