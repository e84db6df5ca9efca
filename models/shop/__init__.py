"""What a shop offers, what is popular in it and with whom, and what goes with what: the lists that need no model."""
