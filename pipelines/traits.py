"""What sources said of customers -> what we hold to be true of them, as of each time at which that changed.

In: words: who, which trait, what value, by whom, when. Out: SQL that gives rows of customer_profile. Where words differ, the source
that is trusted more wins, and among equals the newest word. Forgets no word: the losing ones stay in the table of traits.
"""

from collections.abc import Sequence

from pipelines.engine import literal
from pipelines.sources.mapping import TRAITS


def profile_sql(words: str, *, sources: Sequence[str]) -> str:
    """SQL: rows of customer_profile, one for each change of what was known of a customer; nothing is imputed.

    words: customer_id, trait, value, source, event_timestamp, created_timestamp, any order; null values say nothing. sources: the
    trusted ones, the most trusted first; all others come after them as equals. A word counts from when we knew it: one that comes
    late changes nothing before, and does not win over a newer one of its source or of an equal.
    """
    rank = " ".join(f"WHEN {literal(source)} THEN {-place}" for place, source in enumerate(sources))
    trust = f"CASE source {rank} ELSE {-len(sources)} END" if sources else "0"
    # The value itself breaks a tie, so that two words at one instant give the same answer in every run.
    word = f"CASE WHEN value IS NOT NULL THEN {{'trust': {trust}, 'made': event_timestamp, 'value': value}} END"
    best = ", ".join(f"max(word) FILTER (WHERE trait = '{trait}') OVER so_far AS {trait}" for trait in TRAITS)
    told, imputed = (
        ", ".join(f"{trait}.value AS {trait}" for trait in TRAITS),
        ", ".join(f"false AS is_{trait}_imputed" for trait in TRAITS),
    )
    state = f"({', '.join(TRAITS)})"
    return f"""
        SELECT customer_id, event_timestamp, {", ".join(TRAITS)}, {imputed} FROM (
            SELECT DISTINCT customer_id, event_timestamp, {told} FROM (
                SELECT customer_id, event_timestamp, {best} FROM (
                    SELECT customer_id, trait, greatest(event_timestamp, created_timestamp) AS event_timestamp, {word} AS word FROM {words}
                    WHERE value IS NOT NULL AND trait IN {TRAITS})
                WINDOW so_far AS (PARTITION BY customer_id ORDER BY event_timestamp RANGE UNBOUNDED PRECEDING)))
        QUALIFY {state} IS DISTINCT FROM lag({state}) OVER (PARTITION BY customer_id ORDER BY event_timestamp)"""
