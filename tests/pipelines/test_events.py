from pipelines import events


def test_segment_names_lead_to_known_types() -> None:
    assert set(events.SEGMENT_NAMES.values()) | set(events.SEGMENT_CALLS.values()) <= set(events.TYPES)
    assert set(events.ITEM_TYPES) | set(events.ORDER_TYPES) <= set(events.TYPES)
