"""Records of people -> how much each pair's agreement weighs, in bits, and how probable it makes that they are one person.

The model of Fellegi and Sunter (1969): a level of agreement weighs log2(m / u), m its share within a person and u among strangers;
rare values weigh more. Splink blocks, compares and weighs, on DuckDB; u comes from random pairs and m, without labels, from
expectation maximisation over the patterns of agreement. Handed an open connection; whatever it makes stays there.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from splink import Linker

FIELDS = ("first_name", "last_name", "street", "address", "city", "postcode", "date_of_birth", "phone", "email")
PERSONAL = ("first_name", "date_of_birth", "email")  # not shared by a household

_UNLIKELY = -10.0  # bits: pairs below it cannot teach the model anything
_CHUNK_PAIRS = 1_000_000  # random pairs that are held at once
_ROUNDS = 500
_WORDS = ("first_name", "last_name", "address", "city", "postcode")
_NUMBER = r"\d+[a-z]?"  # of a house


class _Level(NamedTuple):
    name: str
    holds: str | None  # SQL; None: equal
    m: float  # how often it is expected within one person


def _text(column: str, other: str | None = None) -> list[_Level]:
    """Levels of a word; `other` is the field that it is mistaken for."""
    similarity = f"jaro_winkler_similarity({column}_l, {column}_r)"
    levels = [_Level("equal", None, 0.78), _Level("near", f"{similarity} >= 0.92", 0.1), _Level("close", f"{similarity} >= 0.8", 0.04)]
    if other is None:
        return levels
    crossed = (f"jaro_winkler_similarity({one}_l, {two}_r) >= 0.9" for one, two in ((column, other), (other, column)))
    return [*levels, _Level("swapped", " OR ".join(crossed), 0.02)]


def _code(column: str, also: str = "false") -> list[_Level]:
    """Levels of digits: one wrong, missing or transposed is near."""
    return [_Level("equal", None, 0.85), _Level("near", f"damerau_levenshtein({column}_l, {column}_r) <= 1 OR {also}", 0.08)]


_DAY_AND_MONTH = "date_of_birth_l = left(date_of_birth_r, 4) || right(date_of_birth_r, 2) || substr(date_of_birth_r, 5, 2)"
_COMPARED = {
    "first_name": _text("first_name", "last_name"),
    "last_name": _text("last_name", "first_name"),
    "house_number": _code("house_number"),
    "street": _text("street", "address"),
    "address": _text("address", "street"),
    "city": _text("city"),
    "postcode": _code("postcode"),
    "date_of_birth": _code("date_of_birth", _DAY_AND_MONTH),
    "phone": _code("phone"),
    "email": [_Level("equal", None, 0.8), _Level("near", "jaro_winkler_similarity(email_l, email_r) >= 0.94", 0.1)],
}

# Each brings together the records that agree on it; what one error hides from one key, another finds. The names and the two lines
# of the address are put in order first: they are given the wrong way round.
_BLOCKS = (
    "date_of_birth",
    "phone",
    "email",
    "least(first_name, last_name) || '/' || greatest(first_name, last_name)",
    "least(street, address) || '/' || greatest(street, address)",
    "postcode || '/' || house_number",
    "city || '/' || house_number",
    "street || '/' || house_number",
    "street || '/' || postcode",
    "address || '/' || postcode",
    "first_name || '/' || postcode",
    "last_name || '/' || postcode",
    "first_name || '/' || city",
    "last_name || '/' || city",
    "left(first_name, 3) || '/' || left(last_name, 3)",
)


def prepare(db: duckdb.DuckDBPyConnection, records: pd.DataFrame, *, max_block: int) -> list[str]:
    """Create the table `prepared`: the records in the form in which equal values are equal. Returns the fields that can be compared.

    records: `identifier` and any of FIELDS as text. A blocking key that more than `max_block` records share is left out: its pairs
    would be very many, and say little.
    """
    given = pd.DataFrame({name: records.get(name) for name in ("identifier", *FIELDS)}, dtype="object")
    db.register("given", given.sort_values("identifier").reset_index(drop=True))
    keys = ", ".join(f"{key} AS key_{n}" for n, key in enumerate(_BLOCKS))
    rare = "CASE WHEN count(*) OVER (PARTITION BY key_{n}) <= {most} THEN key_{n} END AS block_{n}"
    blocks = ", ".join(rare.format(n=n, most=max_block) for n in range(len(_BLOCKS)))
    db.execute(
        f"""
        CREATE TABLE prepared AS WITH plain AS ({_plain_sql()}), keyed AS (SELECT *, {keys} FROM plain)
        SELECT unique_id, {", ".join(_COMPARED)}, {blocks} FROM keyed ORDER BY unique_id
        """
    ).fetchall()
    known = db.sql(f"SELECT {', '.join(f'count({name})' for name in _COMPARED)} FROM prepared").fetchall()[0]
    return [name for name, count in zip(_COMPARED, known, strict=True) if count > 1]


def train(
    db: duckdb.DuckDBPyConnection, fields: list[str], *, sample_pairs: int, prior_pairs: float, personal_bits: float, seed: int
) -> dict[str, Any]:
    """The fitted model over the table `prepared`, as Splink's dictionary.

    `prior_pairs`: how many pairs the expected agreement within a person counts as, beside the data. A pair whose PERSONAL fields
    weigh less than `personal_bits` is a household as likely as a person: it counts as no match.
    """
    linker = _linker(db, _model(fields))
    linker.training.estimate_u_using_random_sampling(
        sample_pairs, seed=seed, min_count_per_level=None, num_chunks=max(1, sample_pairs // _CHUNK_PAIRS)
    )
    model: dict[str, Any] = linker.misc.save_model_to_json()
    records = db.sql("SELECT count(*) FROM prepared").fetchall()[0][0]
    pairs = records * (records - 1) / 2
    for comparison in model["comparisons"]:
        for level in comparison["comparison_levels"][1:]:
            level["u_probability"] = max(level.get("u_probability") or 0.0, 1.0 / min(sample_pairs, pairs))  # null: never met
    scored = _linker(db, model).inference.predict(threshold_match_weight=_UNLIKELY, warning_mode="never")
    gammas = ", ".join(f"gamma_{name}" for name in fields)
    patterns = db.sql(f"SELECT {gammas}, count(*) AS n FROM {scored.physical_name} GROUP BY {gammas} ORDER BY {gammas}").fetchnumpy()
    counted = np.asarray(patterns["n"], float)
    _maximise(model, [np.asarray(patterns[f"gamma_{name}"], int) for name in fields], counted, pairs, prior_pairs, personal_bits)
    return model


def score(db: duckdb.DuckDBPyConnection, model: dict[str, Any], fields: list[str], *, least: float) -> pd.DataFrame:
    """The pairs at least so probable, sorted: left < right, probability, weight, personal (both bits), evidence.

    evidence: JSON text, field -> [level of agreement, bits]; fields that either record lacks are left out.
    """
    predicted = _linker(db, model).inference.predict(threshold_match_probability=least, warning_mode="never")
    bits = {name: f"(mw_{name} + mw_tf_adj_{name})" for name in fields}
    told = ", ".join(_told_sql(name, bits[name]) for name in fields)
    own = " + ".join(bits[name] for name in fields if name in PERSONAL) or "0"
    found: pd.DataFrame = db.sql(
        f"""
        SELECT least(unique_id_l, unique_id_r) AS "left", greatest(unique_id_l, unique_id_r) AS "right",
            round(match_probability, 6) AS probability, round(match_weight, 2) AS weight, round({own}, 2) AS personal,
            '{{' || concat_ws(', ', {told}) || '}}' AS evidence
        FROM {predicted.physical_name} ORDER BY 1, 2
        """
    ).df()
    return found


def _plain_sql() -> str:
    def plain(name: str) -> str:
        return f"nullif(regexp_replace(lower(strip_accents(CAST({name} AS VARCHAR))), '[^0-9a-z]', '', 'g'), '') AS {name}"

    line, born = "lower(strip_accents(CAST(street AS VARCHAR)))", "trim(CAST(date_of_birth AS VARCHAR))"
    digits = f"regexp_replace({born}, '[^0-9]', '', 'g')"
    return f"""
        SELECT CAST(identifier AS VARCHAR) AS unique_id, {", ".join(map(plain, _WORDS))},
            nullif(regexp_extract({line}, '{_NUMBER}'), '') AS house_number,
            nullif(regexp_replace(regexp_replace({line}, '{_NUMBER}', ''), '[^0-9a-z]', '', 'g'), '') AS street,
            CASE WHEN length({digits}) < 8 THEN NULL
                WHEN regexp_matches({born}, '^[0-9]{{2}}[^0-9]') THEN right({digits}, 4) || substr({digits}, 3, 2) || left({digits}, 2)
                ELSE left({digits}, 8) END AS date_of_birth, -- year first; a day and a month that are exchanged still come near
            nullif(right(regexp_replace(CAST(phone AS VARCHAR), '[^0-9]', '', 'g'), 9), '') AS phone, -- without the prefix of a country
            nullif(lower(trim(CAST(email AS VARCHAR))), '') AS email
        FROM given"""


def _model(fields: list[str]) -> dict[str, Any]:
    return {
        "link_type": "dedupe_only",
        "probability_two_random_records_match": 1e-4,
        "comparisons": [{"output_column_name": name, "comparison_levels": _levels(name)} for name in fields],
        "blocking_rules_to_generate_predictions": [f"l.block_{n} = r.block_{n}" for n in range(len(_BLOCKS))],
        "retain_matching_columns": True,  # else the levels are not told
        "retain_intermediate_calculation_columns": True,
    }


def _levels(name: str) -> list[dict[str, Any]]:
    unknown = {"sql_condition": f"{name}_l IS NULL OR {name}_r IS NULL", "label_for_charts": "unknown", "is_null_level": True}
    by_rarity = {"tf_adjustment_column": name, "tf_adjustment_weight": 1.0}
    levels = [
        {"sql_condition": level.holds or f"{name}_l = {name}_r", "label_for_charts": level.name, "m_probability": level.m}
        | ({} if level.holds else by_rarity)
        for level in _COMPARED[name]
    ]
    rest = 1.0 - sum(level.m for level in _COMPARED[name])
    return [unknown, *levels, {"sql_condition": "ELSE", "label_for_charts": "differs", "m_probability": rest}]


def _maximise(
    model: dict[str, Any], gammas: list[np.ndarray], n: np.ndarray, pairs: float, prior_pairs: float, personal_bits: float
) -> None:
    """Fit m, and the share of pairs that are one person, to the counted patterns of agreement (a level's number; -1 for unknown).

    Maximum a posteriori with a Dirichlet prior: where the data hold few pairs of one person, the expected agreement stays.
    """
    names = [comparison["output_column_name"] for comparison in model["comparisons"]]
    levels = [comparison["comparison_levels"][:0:-1] for comparison in model["comparisons"]]  # by number: 0 is "differs"
    chance = [np.array([level["u_probability"] for level in some]) for some in levels]
    expected = [np.array([level["m_probability"] for level in some]) for some in levels]
    within, share = expected, model["probability_two_random_records_match"]
    for _ in range(_ROUNDS):
        bits = [np.where(g >= 0, np.log2(m / u)[g], 0.0) for g, m, u in zip(gammas, within, chance, strict=True)]
        own = np.sum([some for some, name in zip(bits, names, strict=True) if name in PERSONAL], axis=0)
        odds = np.exp2(np.clip(np.sum(bits, axis=0) + np.log2(share / (1 - share)), -300, 300))
        matches = n * odds / (1 + odds) * (own >= personal_bits)
        counts = [np.bincount(g[g >= 0], matches[g >= 0], len(m)) for g, m in zip(gammas, expected, strict=True)]
        within = [(c + prior_pairs * e) / (c.sum() + prior_pairs) for c, e in zip(counts, expected, strict=True)]
        last, share = share, min(max(matches.sum() / pairs, 0.1 / pairs), 0.5)
        if abs(share - last) < 1e-6 * last:
            break
    model["probability_two_random_records_match"] = share
    for some, m in zip(levels, within, strict=True):
        for level, value in zip(some, m, strict=True):
            level["m_probability"] = float(value)


def _told_sql(name: str, bits: str) -> str:
    which = " ".join(
        f"WHEN {n} THEN '{level}'" for n, level in enumerate(["differs", *(level.name for level in reversed(_COMPARED[name]))])
    )
    return f"""'"{name}": ["' || CASE gamma_{name} {which} END || '", ' || CAST(round({bits}, 1) AS DECIMAL(6, 1)) || ']'"""


def _linker(db: duckdb.DuckDBPyConnection, model: dict[str, Any]) -> "Linker":
    from splink import DuckDBAPI, Linker  # heavy: brings its charts along

    return Linker(DuckDBAPI(db).register("prepared"), model, log_level=None)
