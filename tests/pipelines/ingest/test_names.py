def test_no_raw_identifier_is_in_any_file_but_each_can_be_read_with_its_key(shop) -> None:
    shop.run(
        shop.call("m1", traits={"email": "canary@x.org", "phone": "+49 151 canary 2345678", "firstName": "Canaria"}),
        shop.call("m2", 1, user="canary@x.org"),
        shop.call("m3", 2, user=None, anonymousId="canary@x.org"),
        shop.call("m4", 3, user=None, properties={"product_id": "i", "email": "Canary@X.org "}),
        shop.call("m5", 4, properties={}, traits={"email": "canary@x.org"}),
        shop.call("m6", 5, user="canary-user", anonymousId="canary-device"),
        "canary, and no JSON",
    )
    assert shop.events()["customer_id"].nunique() == 2
    for path in shop.home.rglob("*"):
        assert not path.is_file() or b"canar" not in path.read_bytes().lower(), path
    assert [raw.decode().count("canary") for raw in shop.quarantine()["raw"]] == [1, 1]
    with shop.vault() as vault:
        facts = {(fact.kind, fact.value.lower() if fact.kind == "email" else fact.value) for fact in vault.facts()}
    told = {("email", "canary@x.org"), ("user_id", "canary-user"), ("anonymous_id", "canary-device"), ("first_name", "Canaria")}
    assert told <= facts
    assert ("user_id", "u1") in facts
    assert not [path for path in shop.home.iterdir() if path.name in (".ingest", ".spill")]
