"""The pages of the console. In: what was found. Out: HTML without scripts, readable by keyboard and screen reader.

Nothing is computed but layout; what is missing is said to be missing. Never shows what it was not given.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from serving import access
from serving.console.markup import Html, element, join, page
from serving.wire import Recommendation, Scores

BAR = 60  # units of a contribution's bar to either side
REASONS = 6
NONE = "–"
_WINDOWED = re.compile(r"(.+)_(1h|24h|7d|30d|90d|total)")
_WINDOWS = ("1h", "24h", "7d", "30d", "90d", "total")
_IMPERSONAL = frozenset({"popular", "static"})  # rungs whose answer nothing of the customer went into
_BANDS = {"low": "calm", "medium": "warm", "high": "hot"}


def sign_in(problem: str | None = None) -> bytes:
    """Where a key is asked for. `problem`: what was wrong with the last one."""
    field = element("input", id="key", name="key", type="password", autocomplete="current-password", required=True, autofocus=True)
    form = element(
        "form",
        element("label", "Admin key", for_="key"),
        field,
        element("button", "Sign in", type="submit"),
        method="post",
        action=access.SIGN_IN,
        class_="stack",
    )
    about = element("p", "The console shows personal data. It needs the key of the role admin.", class_="quiet")
    body = element("section", element("h1", "Sign in"), about, _problem(problem), form, class_="card narrow")
    return _page("Sign in", body, is_signed_in=False)


def search(problem: str | None = None, name: str = "") -> bytes:
    """Where a customer is searched. `problem`: why the last search, for `name`, found nothing."""
    about = element("p", "By customer id, user id or e-mail address. The name stays out of addresses and logs.", class_="quiet")
    body = element("section", element("h1", "Find a customer"), about, _problem(problem), _form(name, is_first=True), class_="card narrow")
    return _page("Find a customer", body)


def customer(found: Mapping[str, Any], scores: Mapping[str, Scores], recommended: Recommendation) -> bytes:
    """Everything about one customer. `found`: what GET /profile answers; scores: by task."""
    segment = found.get("segment") or {}
    labels = [segment.get("segment"), segment.get("lifecycle"), segment.get("rfm_tier") and f"{segment['rfm_tier']} value"]
    badges = [element("span", label, class_="badge") for label in labels if label]
    head = element(
        "header",
        element("h1", found["customer_id"]),
        element("p", *(badges or [element("span", "no segment", class_="badge faint")]), class_="badges"),
        element("p", "as of ", _time(found.get("as_of")), class_="quiet"),
        class_="title",
    )
    left = [
        _card("Scores", _scores(scores)),
        _card("Consent", _consent(found.get("consent") or {})),
        _card("Identifiers", _identifiers(found)),
    ]
    right = [
        _card("Recommendations", _recommendations(recommended)),
        _card("Timeline", _timeline(found.get("timeline") or [])),
        _card("Traits", _traits(found.get("traits") or {})),
    ]
    halves = element("div", element("div", *left), element("div", *right), class_="halves")
    return _page(f"Customer {found['customer_id']}", head, halves, _card("Features", _features(found)))


# -- cards


def _scores(scores: Mapping[str, Scores]) -> Html:
    if not scores:
        return _nothing("No model is in use.")
    return join(*(_score(task, answer) for task, answer in scores.items()))


def _score(task: str, answer: Scores) -> Html:
    told = answer.predictions[0]
    value = f"{told.probability:.1%}"
    line = element(
        "p",
        element("strong", value),
        element("meter", value, min=0, max=1, value=f"{told.probability:.4f}", aria_label=f"probability of {task}"),
        element("span", told.band, class_=f"badge {_BANDS.get(told.band, '')}"),
        class_="score",
    )
    reasons = told.reasons[:REASONS]
    most = max((abs(reason.contribution) for reason in reasons), default=0.0) or 1.0
    rows = [[_words(r.feature), _plain(r.value), _bar(r.contribution / most), f"{r.contribution:+.3f}"] for r in reasons]
    table = _table(("feature", "value", "pulls", "log-odds"), rows, numbers=(3,)) if rows else _nothing("No reasons are given.")
    return element("section", element("h3", _words(task)), line, table, _source(answer), class_="part")


def _recommendations(answer: Recommendation) -> Html:
    rows = [[item.rank, item.item_id, item.reason, f"{item.score:.3f}"] for item in answer.items]
    table = _table(("#", "item", "because", "score"), rows, numbers=(0, 3)) if rows else _nothing("Nothing to recommend.")
    return join(table, _source(answer))


def _source(answer: Scores | Recommendation) -> Html:
    """Who answered, and why no better one did."""
    whose = " (the same for everybody)" if answer.source in _IMPERSONAL else ""
    said = f"{answer.source}{whose}, model version {answer.model_version or NONE}"
    age = getattr(answer, "feature_age_s", None)
    return element(
        "p",
        said,
        f", features changed {_duration(age)} ago" if age is not None else None,
        element("span", "degraded", class_="badge hot") if answer.degraded else None,
        f" ({', '.join(answer.causes)})" if answer.causes else None,
        class_="quiet",
    )


def _consent(consent: Mapping[str, Mapping[str, Any]]) -> Html:
    if not consent:
        return _nothing("Nothing was said; no personal data is used.")
    rows = []
    for purpose, said in sorted(consent.items()):
        is_allowed = bool(said.get("is_allowed"))
        mark = element("span", "allowed" if is_allowed else "refused", class_=f"badge {'calm' if is_allowed else 'hot'}")
        rows.append([_words(purpose), mark, said.get("source") or NONE, _time(said.get("event_timestamp"))])
    return _table(("purpose", "state", "source", "said"), rows)


def _identifiers(found: Mapping[str, Any]) -> Html:
    unseen = element("span", "kept as a pseudonym", class_="quiet")
    rows = [[_words(one["kind"]), one.get("value") or unseen] for one in found.get("identifiers") or []]
    links = (found.get("links") or {}).get("path") or []
    why = element("p", f"{len(links)} links make them one person.", class_="quiet") if links else None
    return join(_table(("kind", "masked"), rows) if rows else _nothing("None is known."), why)


def _traits(traits: Mapping[str, Mapping[str, Any]]) -> Html:
    rows = [[_words(trait), _plain(said.get("value")), said.get("source") or NONE] for trait, said in sorted(traits.items())]
    return _table(("trait", "value", "source"), rows) if rows else _nothing("None is known.")


def _timeline(events: Sequence[Mapping[str, Any]]) -> Html:
    if not events:
        return _nothing("No event is in the tables.")
    items = []
    for event in events:
        what = [event.get("item_id"), event.get("order_id") and f"order {event['order_id']}"]
        cents = event.get("revenue_cents")
        money = f"{cents / 100:,.2f}" if cents else None
        detail = " · ".join(str(part) for part in (*what, money) if part)
        items.append(element("li", _time(event.get("event_timestamp")), element("b", _words(str(event["type"]))), element("span", detail)))
    # it scrolls, so the keyboard has to get into it
    return element("div", element("ol", *items, class_="timeline"), class_="scroll tall", tabindex=0, role="region", aria_label="Timeline")


def _features(found: Mapping[str, Any]) -> Html:
    values: Mapping[str, Any] = found.get("features") or {}
    if not any(value is not None for value in values.values()):
        return _nothing("None is served: the store does not answer, or knows nothing of this customer.")
    age = found.get("features_age_s")
    told = element("p", f"newest change {_duration(age)} ago, read from the online store", class_="quiet") if age is not None else None
    windowed: dict[str, dict[str, Any]] = {}
    others = []
    for name, value in values.items():
        match = _WINDOWED.fullmatch(name)
        if match:
            windowed.setdefault(match[1], {})[match[2]] = value
        else:
            others.append([_words(name), _instant(value) if name.endswith("_at") else _plain(value)])
    shown = [window for window in _WINDOWS if any(window in row for row in windowed.values())]
    rows = [[_words(name), *(_plain(row[w]) if w in row else "" for w in shown)] for name, row in windowed.items()]
    tables = [_table(("count or sum", *shown), rows, numbers=range(1, len(shown) + 1)), _table(("other", "value"), others, numbers=(1,))]
    return join(told, element("div", *(element("div", table, class_="scroll") for table in tables), class_="columns"))


# -- parts


def _page(title: str, *body: Html, is_signed_in: bool = True) -> bytes:
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title} – Rapport"),
        element("link", rel="stylesheet", href=access.STYLE),
    )
    leave = element("form", element("button", "Sign out", type="submit", class_="plain"), method="post", action=access.SIGN_OUT)
    home = element("a", "Rapport", element("small", "console"), href=access.CONSOLE, class_="brand")
    is_result = is_signed_in and len(body) > 1
    links = [element("a", "API", href="/"), leave] if is_signed_in else [element("a", "API", href="/")]
    again = _form("", is_first=False) if is_result else None
    top = element("nav", home, again, element("div", *links, class_="links"), aria_label="Console")
    skip = element("a", "To the content", href="#content", class_="skip")
    return page(head, element("body", skip, top, element("main", *body, id="content")))


def _form(name: str, *, is_first: bool) -> Html:
    field = element(
        "input", id="name", name="name", type="search", value=name, maxlength=access.MAX_NAME_BYTES, required=True, autofocus=is_first,
        autocomplete="off", spellcheck="false", placeholder="customer id, user id or e-mail",
    )  # fmt: skip
    label = element("label", "Customer", for_="name", class_=None if is_first else "unseen")
    button = element("button", "Show", type="submit")
    return element("form", label, field, button, method="post", action=access.CUSTOMER, role="search", class_="row")


def _card(title: str, body: Html) -> Html:
    return element("section", element("h2", title), body, class_="card")


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Iterable[int] = ()) -> Html:
    right = frozenset(numbers)
    top = element("tr", *(element("th", head, scope="col", class_="number" if i in right else None) for i, head in enumerate(heads)))
    lines = [element("tr", *(element("td", cell, class_="number" if i in right else None) for i, cell in enumerate(row))) for row in rows]
    return element("table", element("thead", top), element("tbody", *lines))


def _bar(share: float) -> Html:
    """To the right what raises the probability, to the left what lowers it; -1 to 1."""
    width = max(abs(share) * BAR, 1.0)
    start = BAR if share >= 0 else BAR - width
    drawn = element("rect", x=f"{start:.1f}", y=1, width=f"{width:.1f}", height=8, rx=2, class_="up" if share >= 0 else "down")
    said = "raises it" if share >= 0 else "lowers it"
    return element("svg", element("title", said), drawn, width=2 * BAR, height=10, viewBox=f"0 0 {2 * BAR} 10", role="img", class_="bar")


def _problem(problem: str | None) -> Html | None:
    return element("p", problem, class_="problem", role="alert") if problem else None


def _nothing(said: str) -> Html:
    return element("p", said, class_="quiet")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: object) -> str:
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)


def _instant(micros: object) -> Html | str:
    """An instant as features hold it, microseconds since 1970."""
    return _time(datetime.fromtimestamp(micros / 1e6, UTC).isoformat()) if isinstance(micros, int | float) else NONE


def _time(text: object) -> Html | str:
    """A time to the minute, UTC; what is none, as it is."""
    if not text:
        return NONE
    try:
        at = datetime.fromisoformat(str(text)).astimezone(UTC)
    except ValueError:
        return str(text)
    return element("time", at.strftime("%Y-%m-%d %H:%M"), datetime=at.isoformat())


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
