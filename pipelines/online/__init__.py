"""The online store: what a row is in it (`feast_format`, `schema`), and the writers of its SQLite file and of Redis. Read in serving."""
