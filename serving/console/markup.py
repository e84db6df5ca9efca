"""HTML that cannot be broken by what stands in it: every text is escaped where it enters, and only `element` makes markup.

In: names, attributes, children. Out: `Html`. Never takes markup from outside.
"""

from html import escape

VOID = frozenset({"br", "input", "link", "meta", "rect"})  # of these there is no end tag


class Html(str):
    """Markup, ready to be sent. Made by `element` and `join` alone."""

    __slots__ = ()


def element(tag: str, /, *children: object, **attributes: object) -> Html:
    """One element. Children that are not Html are text; None is left out.

    Attributes: `class_` for class, "_" for "-"; True stands alone, None and False are left out.
    """
    written = "".join(_attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    if tag in VOID:
        return Html(f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: object) -> Html:
    """Several, one after the other."""
    return Html("".join(child if isinstance(child, Html) else escape(str(child)) for child in children if child is not None))


def page(*children: object) -> bytes:
    """A whole document, as it is sent. A lone surrogate, which UTF-8 has no bytes for, becomes a question mark."""
    return b"<!doctype html>\n" + element("html", *children, lang="en").encode("utf-8", "replace")


def _attribute(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
