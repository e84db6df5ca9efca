"""The rungs that a list of recommendations may come from, best first: their names, and what is kept of an answer that may be given again.

personal    what suits the customer; `folded_in` where what they did since the training, or all that they ever did, was solved for
stale       the last good answer to this customer
segment     what is popular among customers like them
popular     what is popular in the shop;  static: a list that was prepared beforehand and needs nothing
"""

PERSONAL, FOLDED_IN, STALE, SEGMENT, POPULAR, STATIC = "personal", "folded_in", "stale", "segment", "popular", "static"
ANSWERED_S = 3_600.0  # for how long a customer's last answer is remembered
KEPT = 50  # items of an answer that is remembered: what is left of them once the next request has filtered
