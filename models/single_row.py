"""One row -> what a booster says, through LightGBM's own call for single rows: the same bits as `Booster.predict`, at half the price.

The call keeps its buffers, so every thread has its own. Source: the C API's `LGBM_BoosterPredictForMatSingleRowFast`.
"""

import ctypes
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import lightgbm as lgb

RAW_SCORE, CONTRIBUTIONS = 1, 3  # of the C API: what is asked for
_FLOAT64 = 1


class SingleRow:
    """`kind`: RAW_SCORE gives one number, CONTRIBUTIONS one for each feature and the start. Keeps the booster alive."""

    def __init__(self, booster: "lgb.Booster", kind: int) -> None:
        self._booster, self._kind = booster, kind
        self._local = threading.local()

    def __call__(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """The answer for one row (n_features,), in an array of its own. Raises LightGBMError where LightGBM refuses it."""
        call = getattr(self._local, "call", None)
        if call is None:
            call = self._local.call = _Call(self._booster, self._kind)
        found: NDArray[np.float64] = call(row)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"_booster": self._booster, "_kind": self._kind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_booster"], state["_kind"])  # type: ignore[misc]


class _Call:
    """The handle and the buffers of one thread."""

    def __init__(self, booster: "lgb.Booster", kind: int) -> None:
        from lightgbm.basic import _LIB, _safe_call  # type: ignore[attr-defined]

        self._safe, self._predict, self._free = _safe_call, _LIB.LGBM_BoosterPredictForMatSingleRowFast, _LIB.LGBM_FastConfigFree
        self._booster, self._handle, n = booster, ctypes.c_void_p(), booster.num_feature()
        self._row, self._out, size = np.zeros(n), np.zeros(n + 1 if kind == CONTRIBUTIONS else 1), ctypes.c_int64()
        first_tree, all_trees = ctypes.c_int(0), ctypes.c_int(-1)
        begin = _LIB.LGBM_BoosterPredictForMatSingleRowFastInit
        self._safe(
            begin(
                booster._handle, ctypes.c_int(kind), first_tree, all_trees, ctypes.c_int(_FLOAT64), ctypes.c_int32(n),
                ctypes.c_char_p(b"num_threads=1"), ctypes.byref(self._handle),
            )
        )  # fmt: skip
        given, taken = self._row.ctypes.data_as(ctypes.c_void_p), self._out.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
        self._arguments = (self._handle, given, ctypes.byref(size), taken)

    def __call__(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        self._row[:] = row
        self._safe(self._predict(*self._arguments))
        return self._out.copy()

    def __del__(self) -> None:
        if self._handle:
            self._free(self._handle)
