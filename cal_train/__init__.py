"""cal_train: train LLaVA-style vision-language models with Contrastive ALignment (CAL, arXiv 2405.17871).

Importing it makes transformers' Auto classes know the model type ``mgm``. Neither torch nor transformers is imported
for that: a class is registered when the Auto module that it belongs to is.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_REGISTERED_WITH = {
    "transformers.models.auto.configuration_auto": "cal_train.models.mgm.configuration",
    "transformers.models.auto.modeling_auto": "cal_train.models.mgm.modeling",
    "transformers.models.auto.image_processing_auto": "cal_train.models.mgm.image_processing",
    "transformers.models.auto.processing_auto": "cal_train.models.mgm.processing",
}
"""Modules of Auto classes, and the module of ours that registers a class there when it is imported."""


class _RegisterAfterImport(MetaPathFinder):
    """Finds modules as Python does, and adds a step after those that hold an Auto class."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _REGISTERED_WITH else None
        loader: Any = spec.loader if spec is not None else None
        if loader is None:
            return None
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(_REGISTERED_WITH[fullname])

        loader.exec_module = exec_module
        return spec


for _auto, _ours in _REGISTERED_WITH.items():
    if _auto in sys.modules:
        importlib.import_module(_ours)
sys.meta_path.insert(0, _RegisterAfterImport())
