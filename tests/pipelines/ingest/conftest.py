"""A shop's home and a folder for its files, with the calls that the tests of the ingest repeat."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest

from pipelines import tables
from pipelines.ingest import IngestReport, drain, ingest, ledger, replay
from pipelines.log import Incoming, open_log
from pipelines.log.calls import parse
from pipelines.settings import Settings
from pipelines.sources import Mapping
from pipelines.vault import Vault, open_vault

START = datetime(2024, 3, 1, 10, tzinfo=UTC)
CONTRACT = '[consent]\nlegal_basis = "contract"\npurposes = ["personalization"]'


class Shop:
    """A home and a folder for files. Times are minutes after `start`."""

    start = START
    allowed: ClassVar = {"consent": {"categoryPreferences": {"personalization": True, "marketing": False}}}
    refused: ClassVar = {"consent": {"categoryPreferences": {"personalization": False}}}
    clean = (
        tables.EVENTS, tables.IDENTITIES, tables.IDENTITY_LINKS, tables.CONSENTS, tables.TRAITS, tables.ITEMS, tables.CUSTOMER_PROFILE,
        tables.CUSTOMER_CONSENT,
    )  # fmt: skip

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder, self.home = folder, folder / "home"
        self.settings = Settings(home=self.home, **settings)  # type: ignore[arg-type]

    # -- what is told

    @staticmethod
    def at(minutes: float) -> str:
        return (START + timedelta(minutes=minutes)).isoformat()

    @classmethod
    def call(cls, message: str, minutes: float = 0, *, event: str = "Product Viewed", user: str | None = "u1", **fields: object) -> dict:
        properties = fields.pop("properties", {"product_id": "i1", "price": 9.99, "category": "books"})
        who = {"userId": user} if user else {}
        return {"type": "track", "event": event, "messageId": message, "timestamp": cls.at(minutes), "receivedAt": cls.at(minutes + 0.1),
                **who, "properties": properties, "context": cls.allowed, **fields}  # fmt: skip

    @classmethod
    def order(cls, message: str, minutes: float = 0, *, event: str = "Order Completed", n: int = 2, **fields: object) -> dict:
        products = [{"product_id": f"i{i}", "quantity": i + 1, "price": 10.005, "category": "toys"} for i in range(n)]
        return cls.call(message, minutes, event=event, properties={"order_id": f"o-{message}", "products": products}, **fields)

    def file(self, *calls: dict | str, name: str = "events.jsonl") -> Path:
        path = self.folder / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in calls))
        return path

    # -- what is done

    def ingest(self, *files: Path, mapping: str | Path | Mapping | None = None, **options: object) -> IngestReport:
        return ingest(self.home, list(files), mapping=mapping, settings=options.pop("settings", self.settings), **options)  # type: ignore[arg-type]

    def run(self, *calls: dict | str, name: str = "events.jsonl", **options: object) -> IngestReport:
        return self.ingest(self.file(*calls, name=name), **options)  # type: ignore[arg-type]

    def mapped(self, rows: list[tuple], *, basis: str = CONTRACT, name: str = "a", **options: object) -> IngestReport:
        """Ingest rows of minute, user, kind, item, price, country by a mapping with this basis."""
        return self.ingest(self.csv(rows, name), mapping=self.mapping(name, basis), **options)

    def csv(self, rows: list[tuple], name: str = "a") -> Path:
        path = self.folder / f"{name}.csv"
        told = "".join(f"{self.at(row[0])},{','.join(map(str, row[1:]))}\n" for row in rows)
        path.write_text("at,who,what,item,price,country\n" + told)
        return path

    def mapping(self, name: str = "a", basis: str = CONTRACT, types: str = 'look = "view"\nbuy = "purchase"') -> Path:
        plan = self.folder / f"{name}.toml"
        plan.write_text(
            f'[source]\nname = "{name}"\n[time]\ncolumn = "at"\nunit = "iso"\n[columns]\nuser_id = "who"\ntype = "what"\nitem_id = "item"\n'
            f'price = "price"\n[types]\n{types}\n[traits]\nregion = "country"\n{basis}\n'
        )
        return plan

    def send(self, *calls: dict, source: str = "segment") -> list[str]:
        """Append the calls to the log as the collector would; what became of each."""
        with self.vault() as vault:
            log = open_log(self.home, settings=self.settings, vault=vault)
            events: list[Incoming] = []
            for call in calls:
                received = datetime.fromisoformat(call.get("receivedAt", self.at(0)))
                found = parse(json.dumps(call).encode(), None, source=source, received=received, vault=vault, limits=self.settings.collect)
                events += found.events
            outcomes = [str(outcome) for outcome in log.append(events)]
            log.close()
        return outcomes

    def drain(self) -> IngestReport:
        return drain(self.home, settings=self.settings)

    def replay(self, **options: object):
        return replay(self.home, settings=options.pop("settings", self.settings), **options)

    # -- what there is

    def vault(self) -> "_Opened":
        return _Opened(open_vault(self.home, master=self.settings.master_key))

    def name(self, kind: str, value: str) -> str:
        """The pseudonym that the home has for a name."""
        with self.vault() as vault:
            return vault.pseudonym(kind, value)

    def table(self, table: tables.Table) -> pd.DataFrame:
        return tables.read(self.home, table)

    def events(self) -> pd.DataFrame:
        return self.table(tables.EVENTS)

    def comparable(self) -> pd.DataFrame:
        """The events without what arrival may change: when they came and we knew, and what surrogates and sessions are called."""
        events = self.events().drop(columns=["created_timestamp", "received_timestamp"])
        events["customer_id"] = events["customer_id"].map(self.people())
        events["session_id"] = events.groupby("session_id")["event_timestamp"].transform("min")
        return events.sort_values("event_id").reset_index(drop=True)

    def people(self) -> dict[str, str]:
        """customer_id -> its user id, else the first of its devices in the alphabet: a device that two people share names neither."""
        events, identities = self.events(), self.table(tables.IDENTITIES)
        named = ("user_id:" + events["user_id"]).fillna("anonymous_id:" + events["anonymous_id"])
        every = pd.concat(
            [identities[["customer_id", "identifier"]], pd.DataFrame({"customer_id": events["customer_id"], "identifier": named})]
        )
        is_device = every["identifier"].str.startswith("anonymous_id:")
        first = every.assign(is_device=is_device).sort_values(["is_device", "identifier"]).groupby("customer_id")["identifier"].first()
        return first.to_dict()

    def quarantine(self) -> pd.DataFrame:
        """The quarantine with its bytes opened."""
        rows = self.table(tables.QUARANTINE)
        with self.vault() as vault:
            return rows.assign(raw=vault.unseal(rows["subject"].tolist(), rows["raw"].tolist()))

    def ledger(self) -> dict[str, int]:
        return ledger(self.home, settings=self.settings)

    def is_balanced(self) -> bool:
        counts = self.ledger()
        rest = sum(counts[name] for name in ("applied", "quarantined", "consent_dropped", "erased", "pending"))
        return counts["balance"] == 0 and counts["accepted"] == rest and min(counts.values()) >= 0

    @staticmethod
    def adds_up(report: IngestReport) -> bool:
        return (
            report.read == report.accepted + report.duplicate + report.quarantined
            and report.accepted == report.stored + report.consent_dropped + report.erased
            and report.quarantined == sum(report.reasons.values())
        )


class _Opened:
    def __init__(self, vault: Vault) -> None:
        self.vault = vault

    def __enter__(self) -> Vault:
        return self.vault

    def __exit__(self, *error: object) -> None:
        self.vault.close()


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


@pytest.fixture(scope="session")
def new_shop(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Shop]:
    """Makes a shop in a folder of its own; `like` another one, it gives people the same pseudonyms."""

    def make(*, like: Shop | None = None, **settings: object) -> Shop:
        shop = Shop(tmp_path_factory.mktemp("shop"), **settings)
        with (like or shop).vault():
            pass
        for name in ("vault", "keys") if like else ():
            shutil.copytree(like.home / name, shop.home / name)
        return shop

    return make
