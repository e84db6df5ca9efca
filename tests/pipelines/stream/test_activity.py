"""What customers do, online: equal to the ingest, the feature tables and a point-in-time join over the same log, at any instant."""

ALLOW, DENY = {"personalization": True}, {"personalization": False}
DAY = 86_400.0


def test_an_event_is_in_the_row_as_soon_as_it_is_applied(world, tmp_path) -> None:
    world.say(0, user="ann", product_id="i1", price=9.99)
    world.say(1, "Order Completed", user="ann", order_id="o1", products=[{"product_id": "i1", "quantity": 2, "price": "2.555"}] * 2)
    world.step()
    row = world.row("customer_activity", world.customer("user_id", "ann"))
    assert (row["events_1h"], row["views_total"], row["revenue_cents_30d"], row["orders_total"]) == (3, 1, 1024, 1)
    assert world.is_exact(tmp_path / "truth")


def test_windows_pass_without_an_event(world, tmp_path) -> None:
    world.say(0, user="ann", product_id="i1")
    world.step()
    customer = world.customer("user_id", "ann")
    assert world.row("customer_session", customer)["session_events"] == 1
    world.to(2 * 3_600)
    assert world.row("customer_activity", customer)["events_1h"] == 0
    assert world.row("customer_session", customer)["session_events"] == 0
    assert world.is_exact(tmp_path / "truth")
    world.to(100 * DAY)
    assert world.row("customer_activity", customer)["events_90d"] == 0
    assert world.is_exact(tmp_path / "truth")


def test_history_of_a_visitor_enters_with_the_link(world, tmp_path) -> None:
    world.say(0, user="ann", product_id="i1")
    world.say(10, device="d1", product_id="i2")
    world.step()
    world.say(20, user="ann", device="d1", product_id="i3")
    world.step()
    row = world.row("customer_activity", world.customer("user_id", "ann"))
    assert (row["events_total"], row["distinct_items_total"]) == (3, 3)
    assert world.is_exact(tmp_path / "truth")


def test_late_refusal_takes_out_what_came_after_it(world, tmp_path) -> None:
    world.say(0, user="ann", product_id="i1")
    for n in range(3):
        world.say(10 + n, user="ann", consent=None, product_id="i2")
    world.say(20, user="ann", product_id="i3")
    world.step()
    customer = world.customer("user_id", "ann")
    assert world.row("customer_activity", customer)["events_total"] == 5
    world.say(30, "identify", user="ann", consent=DENY, made_s=5)
    world.step()
    assert world.row("customer_activity", customer)["events_total"] == 2  # the first, and the one with its own permission
    assert world.is_exact(tmp_path / "truth")
