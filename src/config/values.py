"""The values of a config against their types, and what is known of a config before anything slow is imported."""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError

from config.compose import by_key, shown
from config.did_you_mean import nearest

NODES = ("task", "datamodule", "model", "optimizer", "trainer", "logger", "callbacks")  # from which objects are built
PLAIN: dict[str, dict[str, Any]] = {  # the types of keys that are passed to no class, by node
    "": {
        "seed": Annotated[int, Field(ge=0, lt=2**32)],
        "resume": str | None,
        "output_dir": str,
        "allowed_packages": list[str],
        **dict.fromkeys([*NODES, "wandb", "checkpoint", "choices"], dict),
    },
    "wandb": {"entity": str | None, "project": str},
    "checkpoint": {
        "every_seconds": Annotated[float, Field(ge=0)] | None,
        "every_steps": Annotated[int, Field(ge=1)] | None,
    },
    "choices": dict.fromkeys(("task", "model", "optimizer", "experiment", "variant"), str | None),
}

Problems = Iterator[tuple[str, str]]  # pairs of a key and what is wrong with it


def plain_problems(cfg: DictConfig) -> list[str]:
    """What is wrong with the keys that no class gets; first of all, with what any value refers to."""
    try:
        values = by_key(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        return [f"{key}={shown(by_key(OmegaConf.to_container(cfg)).get(key))}: {str(error).splitlines()[0]}"]
    nodes = {path: values[path] for path in PLAIN if isinstance(values.get(path), dict)}
    found = [mismatches(path, node, PLAIN[path], needed=PLAIN[path]) for path, node in nodes.items()]
    return [problem for of_node in found for _, problem in of_node]


def mismatches(
    path: str, values: Mapping[str, Any], types: Mapping[str, Any], needed: Collection[str], further: bool = False
) -> Problems:
    """Keys of a node that are missing, or not known unless `further` are taken, and values of another type."""
    for name in dict.fromkeys([*values, *needed]):
        key = f"{path}.{name}".lstrip(".")
        if name not in values:
            yield key, f"{key} is missing, and cannot be left out"
        elif name in types:
            if rule := broken_rule(types[name], values[name]):
                yield key, f"{key}={shown(values[name])} must be {rule}"
        elif not further:
            near = nearest(key, [f"{path}.{name}".lstrip(".") for name in types])
            yield key, f"key {key} is not known" + (f"; did you mean {near}?" if near else ".")


def broken_rule(hint: Any, value: Any) -> str:
    """What a value should be, if its type is another one."""
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        # as JSON, in which a list may stand for a tuple, as it does in YAML
        adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        return " or ".join(dict.fromkeys(problem["msg"].removeprefix("Input should be ") for problem in error.errors()))
    except (PydanticUserError, NameError):  # an annotation that cannot be checked
        pass
    return ""
