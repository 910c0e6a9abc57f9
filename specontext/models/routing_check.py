"""Entries of a config that route tokens to experts otherwise than the code of its class: refused by name."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType

from transformers import PreTrainedConfig

from specontext.config_entries import declared
from specontext.errors import shown
from specontext.models.class_code import decoders, mentioned

# How tokens are sent to experts, and the functions by which routers score these.
SCORING = re.compile(
    r"^(moe_)?(router_)?(scoring|score|gating|activation)_(func|function)$|^(moe_)?router_(score|activation)(_func\w*)?$"
)
ROUTING = re.compile(
    r"^(moe_)?(rout(er|ed|e)|experts?)\w*_scal\w*$|^(route|router)_scale$|^n_group$|^topk_group$|^num_expert_groups?$|^zero_expert"
)
ROUTER = re.compile(r"rout|moe", re.IGNORECASE)  # in names of classes


def routing_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    """Entries that send tokens to other experts, or weigh these otherwise, than the routers of the config's decoder do."""
    routers = "".join(code_of_routers(module) for module in {sys.modules[kind.__module__] for kind in decoders(config)})
    if not routers:
        return
    for name, value in vars(config).items():
        function, other = str(value).lower(), {"softmax": "sigmoid", "sigmoid": "softmax"}.get(str(value).lower())
        scored = SCORING.search(name) and name not in routers and other in routers and function not in routers if other else False
        ignored = ROUTING.search(name) and value not in (None, False, 0, 1) and not mentioned(config, name)
        averaged = name == "norm_topk_prob" and value and name in declared(config) and name not in routers
        averaged = averaged and not re.search(r"(?<!/)/=? ", routers)
        if scored or ignored or averaged:
            yield f"its config has {name} {shown(value)}, which changes what experts are given and is not computed here"


@cache
def code_of_routers(module: ModuleType) -> str:
    """Source of the classes that a module defines and that route. The module is parsed once, where `inspect.getsource` parses it
    for each class."""
    kinds = inspect.getmembers(module, inspect.isclass)
    names = {name for name, kind in kinds if kind.__module__ == module.__name__ and ROUTER.search(name)}
    if not names:
        return ""
    source = inspect.getsource(module)
    lines = source.splitlines(keepends=True)
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name in names]
    return "".join("".join(lines[node.lineno - 1 : node.end_lineno]) for node in classes)
