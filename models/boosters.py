"""Several boosters of one set of columns -> one booster that says the mean of what they say. LightGBM's text in, LightGBM's text out.

The trees of all are put one after another with their leaves divided by the number of boosters, so the raw score (the logit) is the
mean, and so are contributions. Never trains. Multi-class and linear trees are refused.
"""

import re
from collections.abc import Sequence

_SCALED = ("leaf_value", "internal_value")
_TREE = re.compile(r"^Tree=\d+$", re.MULTILINE)
_END = "end of trees"


def average(texts: Sequence[str]) -> str:
    """One model's text out of several. Raises ValueError where they do not read the same columns in the same way."""
    parts = [_take_apart(text) for text in texts]
    heads = {head for head, _, _ in parts}
    if len(heads) != 1:
        raise ValueError(f"average: expected boosters of the same columns and objective, found {len(heads)} kinds among {len(texts)}")
    head, _, tail = parts[0]
    if "num_tree_per_iteration=1\n" not in head or any("is_linear=1" in tree for _, trees, _ in parts for tree in trees):
        raise ValueError("average: expected plain trees, one per round; found several or linear ones")
    trees = [_scaled(tree, len(parts)) for _, trees, _ in parts for tree in trees]
    body = "".join(f"Tree={number}\n{tree}" for number, tree in enumerate(trees))
    return f"{head}\n{body}{_END}{tail}"


def _take_apart(text: str) -> tuple[str, list[str], str]:
    """What stands before the trees (without their sizes, which LightGBM does not need), the trees, and what stands after."""
    trees, end, tail = text.partition(_END)
    pieces = _TREE.split(trees)
    if not end or len(pieces) < 2:
        raise ValueError("average: expected the text of a LightGBM model with trees, found none")
    head = "\n".join(line for line in pieces[0].splitlines() if line and not line.startswith("tree_sizes="))
    # what differs between boosters of the same data says nothing of how they read columns
    return head + "\n", [piece.lstrip("\n") for piece in pieces[1:]], tail


def _scaled(tree: str, divisor: int) -> str:
    lines = []
    for line in tree.split("\n"):
        name, equals, values = line.partition("=")
        if equals and name in _SCALED and values:
            line = f"{name}={' '.join(repr(float(value) / divisor) for value in values.split(' '))}"
        lines.append(line)
    return "\n".join(lines)
