"""Rows -> what a booster's trees add up to, through LightGBM's own call: what `Booster.predict` says, without what it prepares for each
call anew. Source: the C API's `LGBM_BoosterPredictForMat`.
"""

import ctypes
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.single_row import RAW_SCORE

if TYPE_CHECKING:
    import lightgbm as lgb

_FLOAT32, _BY_ROW = 0, 1


class Forest:
    """Keeps the booster alive. One thread scores; several may ask at a time."""

    def __init__(self, booster: "lgb.Booster") -> None:
        from lightgbm.basic import _LIB, _safe_call  # type: ignore[attr-defined]

        self._safe, self._predict, self._booster, self._width = _safe_call, _LIB.LGBM_BoosterPredictForMat, booster, booster.num_feature()
        self._options = ctypes.c_char_p(b"num_threads=1")  # with several, waiting for one another costs more than a few hundred rows

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """The raw score of each row (n, n_features). Raises ValueError on another width, LightGBMError where LightGBM refuses them."""
        if rows.ndim != 2 or rows.shape[1] != self._width:
            raise ValueError(f"Forest: expected rows of {self._width} features, found an array of shape {rows.shape}")
        given, found, size = np.ascontiguousarray(rows, dtype=np.float32), np.empty(len(rows)), ctypes.c_int64()
        self._safe(
            self._predict(
                self._booster._handle, ctypes.c_void_p(given.ctypes.data), ctypes.c_int(_FLOAT32), ctypes.c_int32(len(rows)),
                ctypes.c_int32(self._width), ctypes.c_int(_BY_ROW), ctypes.c_int(RAW_SCORE), ctypes.c_int(0), ctypes.c_int(-1),
                self._options, ctypes.byref(size), ctypes.c_void_p(found.ctypes.data),
            )
        )  # fmt: skip
        return found
