"""The recipes behind `fastflow train MODEL --data NAME`.

Every file here is a model: `RECIPES`, from the name of a data set to a short recipe, and perhaps `PUBLISHED`, to the
one of the paper (`--published`). A new file is found without being named anywhere.
"""

import importlib
import pkgutil

from ..recipe import Recipe

RECIPES: dict[str, dict[str, Recipe]] = {}
PUBLISHED: dict[str, dict[str, Recipe]] = {}

for _file in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_file.name}")
    RECIPES[_file.name] = _module.RECIPES
    PUBLISHED[_file.name] = getattr(_module, "PUBLISHED", {})
