"""What every learner shares: hyper-parameters stored under their own names, read and set as scikit-learn does.

A learner's constructor stores and does nothing else; `fit` checks, learns and returns self; what it learned ends in "_".
"""

import inspect
import json
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class Learner:
    """Base of the learners. Works with `sklearn.base.clone` without importing scikit-learn."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The hyper-parameters by name. `deep` is there for scikit-learn: no learner contains another."""
        return {name: getattr(self, name) for name in self._param_names()}

    def set_params(self, **params: Any) -> Self:
        """Change hyper-parameters; takes effect at the next `fit`. Raises ValueError on a name that is not one."""
        unknown = sorted(set(params) - set(self._param_names()))
        if unknown:
            raise ValueError(f"{type(self).__name__}: {unknown} are not parameters; known are {self._param_names()}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        """The constructor call that makes an equal, unfitted learner."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    @classmethod
    def _param_names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def _check_fitted(self, attribute: str) -> None:
        if not hasattr(self, attribute):
            raise ValueError(f"{type(self).__name__}: it has learned nothing yet; call fit or load first")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Numbers are written so that they read back to the same bit. Raises ValueError on NaN: JSON has none."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False, default=lambda scalar: scalar.item()) + "\n")


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """The content of a saved learner's description. Raises ValueError if it describes another kind of learner."""
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("kind") != kind:
        raise ValueError(f"{path}: expected the description of a {kind}, found {content.get('kind')!r}")
    return content


def read_array(path: Path, *, is_mapped: bool) -> NDArray[Any]:
    """A saved array; mapped, processes share one copy in memory, and only what is looked at is read."""
    # mapped copy-on-write: compiled code refuses read-only arrays
    array: NDArray[Any] = np.load(path, mmap_mode="c" if is_mapped else None, allow_pickle=False)
    return array.view(np.ndarray)
