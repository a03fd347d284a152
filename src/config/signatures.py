"""What a callable takes, as a pydantic model made from its signature; and which values are wrong under a model."""

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, PydanticUserError, ValidationError, create_model

from config.compose import shown
from config.did_you_mean import unknown

INSTRUCTIONS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")  # Hydra's own keys of a node
GIVEN_IF_NULL = ("max_len",)  # `run/build.py` knows the longest input
PASSED_ON = {  # what a class, or one that is derived from it, passes further arguments to
    "LossOnlyOptimizer": "search.base.LossOnlyOptimizer",
    "WandbLogger": "wandb.init",
    "WandbRun": "wandb.init",
    "TensorBoardLogger": "torch.utils.tensorboard.SummaryWriter",
}


def find(name: str) -> Any:
    """What a dotted name stands for.

    Raises:
        ImportError, AttributeError, ValueError: it stands for nothing.
    """
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def arguments_model(target: Callable, given: Mapping[str, Any], filled_in: Sequence[str]) -> type[BaseModel]:
    """A pydantic model of a callable's arguments: names, types, and whether further ones are taken.

    Args:
        target: the callable.
        given: the arguments that a config gives.
        filled_in: arguments that the program gives.
    """
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some classes written in C have no signature
        return strict_model({}, further=True)
    fields: dict[str, Any] = dict.fromkeys(filled_in, (Any, None))
    further = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    bases = inspect.getmro(target) if isinstance(target, type) else ()
    passed_on = next((PASSED_ON[base.__name__] for base in bases if base.__name__ in PASSED_ON), None)
    if further and passed_on and given.keys() - parameters.keys():
        receiver = find(passed_on)
        fields |= {n: (type_of(p, receiver), None) for n, p in inspect.signature(receiver).parameters.items()}
        further = False
    for name, parameter in parameters.items():
        named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if named and name not in filled_in and not name.startswith("_"):
            hint, required = type_of(parameter, target), parameter.default is parameter.empty
            fields[name] = (hint | None, None) if name in GIVEN_IF_NULL else (hint, ... if required else None)
    return strict_model(fields, further)


def strict_model(fields: dict[str, Any], further: bool = False) -> type[BaseModel]:
    """A pydantic model of the fields, each a pair of type and default; `further`: others are taken too."""
    config = ConfigDict(extra="allow" if further else "forbid", arbitrary_types_allowed=True)
    return create_model("Keys", __config__=config, **fields)


def type_of(parameter: inspect.Parameter, target: Callable) -> Any:
    """The annotation of a parameter, or Any where it is missing or cannot be checked."""
    if parameter.annotation is parameter.empty:
        return Any
    config = ConfigDict(arbitrary_types_allowed=True)
    try:  # pydantic looks up an annotation that is text in the module of the target
        field: Any = (parameter.annotation, ...)
        probe = create_model("Probe", __module__=target.__module__, __config__=config, value=field)
        probe.model_rebuild(force=True)
    except (NameError, TypeError, PydanticUserError):  # a name that only type checkers import, or no checkable type
        return Any
    return probe.model_fields["value"].annotation


def validate(model: type[BaseModel], values: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Problems of `values` under a pydantic model, as (key, message); `_target_` nodes inside are checked apart."""
    plain = {k: v for k, v in values.items() if not (isinstance(v, dict) and "_target_" in v)}
    try:
        # as JSON, in which a list may stand for a tuple, as it does in YAML
        model.model_validate_json(json.dumps(plain, default=str), strict=True)
        return
    except ValidationError as error:
        problems = error.errors()
    for problem in problems:
        name = str(problem["loc"][0])
        if name in values and name not in plain:
            continue
        key, value = f"{path}.{name}".lstrip("."), shown(values.get(name))
        if problem["type"] == "extra_forbidden":
            known = [f"{path}.{field}".lstrip(".") for field in model.model_fields]
            yield key, unknown(f"key {key}", key, known, list_known=False)
        elif problem["type"] == "missing":
            yield key, f"{key} is missing, and cannot be left out"
        elif problem["type"] == "dict_type" and not path:
            yield key, f"{key}={value}: expected keys below it, not a value"
        else:
            annotation = model.model_fields[name].annotation
            wanted = annotation.__name__ if isinstance(annotation, type) else str(annotation)
            wanted = re.sub(r"NoneType|None", "null", re.sub(r"typing\.|[a-z_.]+\.(?=[A-Z])", "", wanted))
            rule = problem["msg"].removeprefix("Input should be ")
            yield key, f"{key}={value}: expected {wanted}" + (f", {rule}" if "than" in rule else "")
