"""What a home holds at the moment."""

import typer

from pipelines.commands import home, terminal
from pipelines.commands.terminal import AsJson

app = typer.Typer()


@app.command()
def status(as_json: AsJson = False) -> None:
    """Rows per table, champion versions, freshness. Example: rapport status --json"""
    from datetime import UTC, datetime

    from pipelines import ingest, registry, tables

    folder = home.settings().home
    champions = registry.champions(folder)
    built = tables.folder(folder, tables.CUSTOMER_ACTIVITY)
    terminal.show(
        {
            "home": str(folder.absolute()),
            "log": ingest.ledger(folder),
            "tables": {table.name: tables.count(folder, table) for table in tables.TABLES if tables.exists(folder, table)},
            "models": {name: entry["version"] for name, entry in champions.items()},
            "freshness_s": round(datetime.now(UTC).timestamp() - built.resolve().stat().st_mtime, 1) if built.exists() else None,
        },
        as_json,
    )
