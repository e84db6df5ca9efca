"""Forget a person everywhere, with a signed receipt; or tell them everything that is held. Re-exports; does nothing."""

from pipelines.erasure.exports import export
from pipelines.erasure.process import erase, resume
from pipelines.erasure.receipts import Receipt, checked, verify_receipt

__all__ = ["Receipt", "checked", "erase", "export", "resume", "verify_receipt"]
