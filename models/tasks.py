"""Which supervised tasks there are: every `Task` that a module of `models` declares, found by looking, listed nowhere.

A file added to `models` is a model that is trained, scored, served and watched under the name of its task.
"""

import importlib
import pkgutil

import models
from models.task import Task


def declared() -> dict[str, Task]:
    """Tasks by name. Raises ValueError where two have one name, or a name is no identifier: it is that of a folder and of a path."""
    found: dict[str, Task] = {}
    for module in pkgutil.iter_modules(models.__path__):
        if module.ispkg:
            continue
        for value in vars(importlib.import_module(f"{models.__name__}.{module.name}")).values():
            if not isinstance(value, Task) or found.get(value.name) is value:
                continue
            if value.name in found or not value.name.isidentifier():
                raise ValueError(f"expected one task of each name, an identifier; found {value.name!r} again in {module.name}")
            found[value.name] = value
    return found
