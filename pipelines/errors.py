"""The errors a user can mend. The command line prints their sentence and exits 1; anything else is a defect.

PipelineError
|-- InputError        a file or mapping is missing, unreadable, empty or of the wrong shape
|-- NotTrainable      the data cannot carry a model's labels; says why
|-- StoreError        a table, feature store or disk refused; nothing was half-written
`-- RegistryError     a model version is unknown, damaged or not signed by this home
"""


class PipelineError(Exception):
    """Says what was expected, what was found, where, and what to do next."""


class InputError(PipelineError):
    """A file or mapping is missing, unreadable, empty or of the wrong shape."""


class NotTrainable(PipelineError):
    """The data cannot carry this model's labels. The message completes "not trainable, because ...".

    `prior`: the base rate, where the labels that there were show one.
    """

    def __init__(self, reason: str, *, prior: float | None = None) -> None:
        super().__init__(reason)
        self.prior = prior


class StoreError(PipelineError):
    """A table, feature store or disk refused; nothing was half-written."""


class RegistryError(PipelineError):
    """A model version is unknown, damaged or not signed by this home."""
