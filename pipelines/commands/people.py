"""People: who is who, what is held about one, and how they are forgotten."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands import home, terminal
from pipelines.commands.terminal import AsJson
from pipelines.errors import InputError

app = typer.Typer()
identity_app = typer.Typer(no_args_is_help=True, help="Which identifiers are one person, and why.")
app.add_typer(identity_app, name="identity")

Person = Annotated[str, typer.Argument(help="A customer_id, a user id, an e-mail address, or kind:value.")]


@identity_app.command("resolve")
def identity_resolve(as_json: AsJson = False) -> None:
    """Find people under several names by what they said of themselves; the sure ones are joined. Example: rapport identity resolve"""
    from pipelines import ingest as arrow
    from pipelines.identity import linkage

    settings = home.settings()
    with terminal.step("resolve"):
        with home.vault(settings) as vault:
            found = linkage.run(settings.home, vault=vault)
        arrow.reassign(settings.home, settings=settings)
    terminal.show(found, as_json)


@identity_app.command("explain")
def identity_explain(customer: Person, as_json: AsJson = False) -> None:
    """Why this person's identifiers are one. Example: rapport identity explain anna@example.org"""
    from pipelines.identity import graph

    settings = home.of_people()
    with home.vault(settings) as vault:
        found = graph.explain(settings.home, customer, vault=vault)
    if as_json:
        terminal.show(found, as_json)
        return
    terminal.out.print(f"{found.customer_id} is", *found.identifiers, sep="\n  ", highlight=False)
    shown = ("link_id", "left", "right", "kind", "state", "weight", "created_timestamp")
    for title, links in (("linked by", found.path), ("also decided", found.others), ("waiting for review", found.reviews)):
        if links:
            terminal.out.print(f"\n{title}")
            terminal.show_rows([{name: getattr(link, name) for name in shown} for link in links], as_json=False)


@identity_app.command("unmerge")
def identity_unmerge(link: Annotated[str, typer.Argument(help="A link, as `explain` shows it.")], as_json: AsJson = False) -> None:
    """Take a link back: both people get their own events and features again. Example: rapport identity unmerge LINK"""
    from pipelines import ingest as arrow
    from pipelines.identity import graph

    settings = home.settings()
    with terminal.step("unmerge"):
        decision = graph.unmerge(settings.home, link, by=home.who())
        home.record(settings, "unmerge", link=link)
        arrow.reassign(settings.home, settings=settings)
    terminal.show(decision, as_json)
    if decision.is_one:
        terminal.err.print("other links still join the two; see `rapport identity explain`", highlight=False)


@identity_app.command("reviews")
def identity_reviews(as_json: AsJson = False) -> None:
    """Pairs that a person has to decide. Example: rapport identity reviews"""
    from pipelines.identity import graph

    terminal.show_rows(graph.reviews(home.settings().home).to_dict("records"), as_json)


@identity_app.command("decide")
def identity_decide(
    link: Annotated[str, typer.Argument(help="A pair, as `reviews` lists it.")],
    accept: Annotated[bool, typer.Option("--same/--different", help="Whether the two are one person.")],
    as_json: AsJson = False,
) -> None:
    """Decide a pair of the review queue. Example: rapport identity decide LINK --same"""
    from pipelines import ingest as arrow
    from pipelines.identity import graph

    settings = home.settings()
    decision = graph.decide(settings.home, link, accept=accept, by=home.who())
    home.record(settings, "decide link", link=link, same=accept)
    arrow.reassign(settings.home, settings=settings)
    terminal.show(decision, as_json)


@app.command()
def export(customer: Person, to: Annotated[Path | None, typer.Option("--out", help="A file; none: printed.")] = None) -> None:
    """Everything held about a person, as JSON. Example: rapport export anna@example.org --out anna.json"""
    from pipelines import erasure

    settings = home.of_people()
    home.drain(settings)
    held = json.dumps(erasure.export(settings.home, customer, settings=settings, by=home.who()), indent=1, default=str, ensure_ascii=False)
    if to is None:
        print(held)  # noqa: T201
    else:
        try:
            to.touch(mode=0o600)
            if to.is_file():
                to.chmod(0o600)  # one that was there before too
            to.write_text(held + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"export: {to} could not be written ({error.strerror}); give another --out") from error


@app.command()
def erase(customer: Person, as_json: AsJson = False) -> None:
    """Forget a person everywhere, and give a signed receipt. Example: rapport erase anna@example.org"""
    from datetime import UTC, datetime

    from pipelines import erasure

    settings = home.of_people()
    with terminal.step("erase"):
        home.drain(settings)
        receipt = erasure.erase(settings.home, customer, settings=settings, by=home.who(), as_of=datetime.now(UTC))
    terminal.show(receipt, as_json)


@app.command()
def receipt(file: Annotated[Path, typer.Argument(help="A receipt of an erasure, as JSON.")], as_json: AsJson = False) -> None:
    """Whether this home signed a receipt as it is; exit 1 where it did not. Example: rapport receipt .rapport/erasures/ID.json"""
    from pipelines import erasure

    terminal.show(erasure.checked(home.settings().home, file), as_json)
