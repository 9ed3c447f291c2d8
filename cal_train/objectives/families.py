"""All objectives by name."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from cal_train.objectives.base import Objective
from cal_train.objectives.clip import Clip
from cal_train.objectives.coca import Coca
from cal_train.objectives.filip import Filip
from cal_train.objectives.llip import Llip
from cal_train.objectives.siglip import SigLip
from cal_train.objectives.sparc import Sparc
from cal_train.objectives.sycoca import SyCoca
from cal_train.towers.outputs import TowerShape

OBJECTIVES: dict[str, type] = {
    "clip": Clip,
    "siglip": SigLip,
    "coca": Coca,
    "sycoca": SyCoca,
    "sparc": Sparc,
    "llip": Llip,
    "filip": Filip,
}


CONTAINS = {"coca": "clip", "sycoca": "coca"}
"""The objective that another one is built around, and hands further options to."""


def option_names(name: str) -> list[str]:
    """Return the options of an objective, in the order of its constructor, then those of the one it is built around."""
    parameters = inspect.signature(OBJECTIVES[name]).parameters.values()
    own = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    inner = option_names(CONTAINS[name]) if name in CONTAINS else []
    return own + [option for option in inner if option not in own]


def build_objective(name: str, shape: TowerShape, options: Mapping[str, Any] | None = None) -> Objective:
    """Build an objective for towers of this shape.

    Args:
        name: One of `OBJECTIVES`.
        shape: The towers' sizes.
        options: Keyword arguments of its class.

    Raises:
        ValueError: If there is no such objective or option (naming the nearest one, and which objectives have it), or
            if the options do not fit the towers or each other.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r} is unknown{_nearest(name, list(OBJECTIVES))}: {', '.join(OBJECTIVES)}")
    known = option_names(name)
    for option in options or {}:
        if option not in known:
            owners = [other for other in OBJECTIVES if option in option_names(other)]
            belongs = f" (it is one of {', '.join(owners)})" if owners else _nearest(option, known)
            raise ValueError(
                f"objective_options: {name} has no option {option!r}{belongs}; its options: {', '.join(known)}"
            )
    return OBJECTIVES[name](shape, **(options or {}))


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
