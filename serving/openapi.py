"""The OpenAPI description of what the gateway answers itself and BentoML therefore does not describe: collection, and people; and of what
BentoML leaves out: refusals, which fields may be null, and bodies that may be sent as they are shown.

In: a document. Out: the same with their paths and bodies. Describes; decides nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from types import NoneType
from typing import Any, get_args, get_type_hints

from serving import wire
from serving.access import ERASURE, EXPORT, PIXEL, PROFILE, is_score

_TEXT: dict[str, Any] = {"type": "string"}
_OBJECT: dict[str, Any] = {"type": "object"}
_TIME: dict[str, Any] = {"type": "string", "format": "date-time"}
_COMMON: dict[str, Any] = {
    "userId": {**_TEXT, "description": "the shop's own id; this or anonymousId is expected"},
    "anonymousId": {**_TEXT, "description": "the device's id"},
    "messageId": {**_TEXT, "description": "idempotency key: an event is kept once for each source; made where absent"},
    "timestamp": {**_TIME, "description": "when it happened, by the sender's clock; the receipt where absent"},
    "sentAt": {**_TIME, "description": "when it was sent, by the same clock; corrects it"},
    "context": {**_OBJECT, "description": "consent.categoryPreferences says what the data may be used for"},
    "integrations": _OBJECT,
    "writeKey": {**_TEXT, "description": "for senders that can set no header"},
}
_OWN: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "track": ("What somebody did.", ["event"], {"event": _TEXT, "properties": _OBJECT}),
    "identify": ("Who somebody is.", [], {"traits": _OBJECT}),
    "page": ("A page that somebody saw.", [], {"name": _TEXT, "category": _TEXT, "properties": _OBJECT}),
    "screen": ("A screen of an app that somebody saw.", [], {"name": _TEXT, "category": _TEXT, "properties": _OBJECT}),
    "group": ("A group that somebody belongs to.", ["groupId"], {"groupId": _TEXT, "traits": _OBJECT}),
    "alias": ("Two ids of one person.", ["previousId", "userId"], {"previousId": _TEXT}),
}
# A body of each call. Without a messageId and a time, so that whoever sends it twice has sent two calls, of now.
_SAMPLES: dict[str, dict[str, Any]] = {
    "track": {
        "userId": "u1",
        "event": "Product Viewed",
        "properties": {"product_id": "i00312", "category": "tools", "price": 19.9},
        "context": {"consent": {"categoryPreferences": {"personalization": True}}},
    },
    "identify": {"userId": "u1", "anonymousId": "a1", "traits": {"email": "anna@example.org"}},
    "page": {"anonymousId": "a1", "name": "Home"},
    "screen": {"anonymousId": "a1", "name": "Home"},
    "group": {"userId": "u1", "groupId": "g1", "traits": {"name": "Regulars"}},
    "alias": {"previousId": "a1", "userId": "u1"},
}
_SAMPLES["batch"] = {"batch": [{"type": kind, **_SAMPLES[kind]} for kind in ("track", "identify")]}
_CODES = {
    "400": "not a call; `field` names what is wrong",
    "401": "no valid write key",
    "403": "a key that may not collect",
    "408": "the body did not come in time",
    "413": "too large: an event, a body (also once unpacked), or too many events",
    "415": "a content encoding other than gzip",
    "429": "this source sends more than it may; Retry-After says when to go on",
    "503": "too many events wait, or the log cannot be written; send them again",
    "507": "the disk is full; send them again later",
}
_SUCCESS = {"type": "object", "required": ["success"], "properties": {"success": {"type": "boolean", "enum": [True]}}}
_BENTOML = "Service APIs"  # how BentoML calls what a service answers
_SECURITY: list[dict[str, list[str]]] = [{"writeKey": []}, {"key": []}]


def describe_nulls(document: dict[str, Any]) -> None:
    """Mark the fields of requests and answers that may be null, as their types say."""
    shapes = {kind.__name__: kind for kind in vars(wire).values() if isinstance(kind, type) and kind.__module__ == wire.__name__}
    for schema in _schemas(document):
        kind = shapes.get(schema.get("title", ""))
        for name, hint in get_type_hints(kind).items() if kind else ():
            if NoneType in get_args(hint) and name in schema["properties"]:
                schema["properties"][name]["nullable"] = True


def _schemas(part: Any) -> Iterator[dict[str, Any]]:
    """Every object's schema in this part of a document."""
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    if isinstance(part, dict) and isinstance(part.get("properties"), dict):
        yield part
    for child in inner:
        yield from _schemas(child)


def describe_decisions(document: dict[str, Any], paths: Iterable[str]) -> None:
    """Give the paths of decisions their key, a summary, a body to send and their refusals. Expects the schema `Refusal`."""
    tag = {"name": "Decisions", "description": "What to show a customer, and what they are likely to do."}
    document["tags"] = [tag, *(other for other in document.get("tags", []) if other["name"] != _BENTOML)]
    codes = {
        "400": "not a valid request",
        "401": "no valid key",
        "403": "a key of a lesser role",
        "413": "too large",
        "429": "too many",
        "503": "it cannot be answered in time; Retry-After says when to ask again",
    }
    for path in paths:
        missing = {"404": "no such model; the message lists those there are"} if is_score(path) else {}
        operation = document["paths"][path]["post"]
        operation |= {"tags": [tag["name"]], "summary": operation["description"], "security": [{"key": []}]}
        operation["requestBody"]["content"]["application/json"]["example"] = (
            {"customer_id": "u1", "k": 5} if path == "/recommend" else {"customer_ids": ["u1", "u2"], "reasons": 3}
        )
        given = {str(code): answer for code, answer in operation["responses"].items() if str(code) == "200"}
        operation["responses"] = given | _described(codes | missing)


def describe_collection(document: dict[str, Any]) -> None:
    """Add the paths of collection. Expects the schema `Refusal` among the document's components."""
    components = document["components"]
    components["securitySchemes"]["writeKey"] = {"type": "http", "scheme": "basic", "description": "a write key as the user name"}
    for kind, (about, needs, own) in _OWN.items():
        components["schemas"][kind.title()] = {"type": "object", "description": about, "required": needs, "properties": own | _COMMON}
    components["schemas"]["Batch"] = _batch()
    for kind in (*_OWN, "batch"):
        document["paths"][f"/v1/{kind}"] = {"post": _operation(kind)}
    document["paths"][PIXEL] = {"get": _pixel()}


def describe_people(document: dict[str, Any]) -> None:
    """Add the paths of one person, for the role admin. Expects the schema `Refusal` among the document's components."""
    done = {"200": "as JSON", "202": "not done yet: ask again with the `request_id` of the answer"}
    again = [{"name": "request_id", "in": "query", "schema": _TEXT, "description": "of a 202, to ask for what was not done then"}]
    paths = document["paths"]
    shown = "Who somebody is: masked names, consent, traits, newest features with their age, scores."
    profile = _about_person("profile", shown, {"200": done["200"]})
    paths[PROFILE] = {"get": profile, "delete": _about_person("erase", "Forget somebody everywhere; the signed receipt.", done)}
    paths[EXPORT] = {"get": _about_person("export", "Everything that is held about somebody.", done, again)}
    paths[ERASURE] = {"get": _about_person("erasure", "The receipt of an erasure that took longer than its caller waited.", done, again)}


def _about_person(name: str, about: str, done: dict[str, str], more: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    who = {"name": "customer_id", "in": "path", "required": True, "schema": _TEXT, "description": "or a user id, or an address"}
    codes = {
        "401": "no valid key",
        "403": "a key of a lesser role",
        "404": "nobody is known under this name, or no such request",
        "429": "too many such requests wait",
        "503": "the worker beside the service is not running",
    }
    return {
        "tags": ["People"],
        "summary": about,
        "operationId": name,
        "security": [{"key": []}],
        "parameters": [who, *(more or [])],
        "responses": {
            **{code: {"description": text, "content": {"application/json": {"schema": _OBJECT}}} for code, text in done.items()},
            **_described(codes),
        },
    }


def _batch() -> dict[str, Any]:
    kinds = {"type": {"type": "string", "enum": list(_OWN)}}
    call = {"allOf": [{"oneOf": [{"$ref": f"#/components/schemas/{kind.title()}"} for kind in _OWN]}, {"properties": kinds}]}
    shared = {name: _COMMON[name] for name in ("context", "integrations", "sentAt", "writeKey")}
    properties = {"batch": {"type": "array", "items": {**call, "required": ["type"]}}, **shared}
    return {"type": "object", "required": ["batch"], "properties": properties}


def _operation(kind: str) -> dict[str, Any]:
    about = _OWN[kind][0] if kind in _OWN else "Calls of any kind; the good ones are kept, each bad one is set aside with its reason."
    schema = {"schema": {"$ref": f"#/components/schemas/{kind.title()}"}, "example": _SAMPLES[kind]}
    return {
        "tags": ["Collection"],
        "summary": about,
        "description": "As the Segment HTTP API. JSON under any content type, also in gzip; 200 once every event is on disk.",
        "operationId": f"collect_{kind}",
        "security": _SECURITY,
        "requestBody": {"required": True, "content": {"application/json": schema, "text/plain": schema}},
        "responses": {"200": {"description": "kept", "content": {"application/json": {"schema": _SUCCESS}}}, **_described(_CODES)},
    }


def _pixel() -> dict[str, Any]:
    about = {
        "data": "one call as JSON in base64url; or its fields one by one",
        "writeKey": "the key of the source",
        "type": "the call; `track` with an event, else `page`",
        "event": "",
        "userId": "",
        "anonymousId": "",
    }
    return {
        "tags": ["Collection"],
        "summary": "One call as the address of an image, for mails and pages without scripts; other parameters are properties.",
        "operationId": "collect_pixel",
        "security": [],
        "parameters": [{"name": name, "in": "query", "schema": _TEXT, "description": text} for name, text in about.items()],
        "responses": {"200": {"description": "kept; a transparent image", "content": {"image/gif": {}}}, **_described(_CODES)},
    }


def _described(codes: Mapping[str, str]) -> dict[str, Any]:
    """Refusals: code -> what it means, with the shape that all of them have."""
    body = {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}}
    return {code: {"description": about, "content": body} for code, about in codes.items()}
