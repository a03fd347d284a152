"""Everything that can be wrong with a config is found before anything starts.

Every key is compared with the signature it will be passed to, and every value with its type (`config/nodes.py`). Then,
by building the data, the model, the optimizer and the trainer, every value is compared with its range and with the
others (`config/builds.py`). `run/start.py` calls this where Hydra has composed a config and made no directory yet.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from hydra.conf import HydraConf
from omegaconf import DictConfig

from config.builds import check_builds
from config.compose import DEFAULT_CONFIG, compose_config, given, job_config, key_of
from config.did_you_mean import unknown
from config.draft import Draft
from config.nodes import check_text
from config.refusal import ConfigError


def check(cfg: DictConfig, hydra: HydraConf, alike: dict[str, Draft] | None = None) -> Draft:
    """Check the config of a job.

    Args:
        cfg: the config, as `job_config` gives it.
        hydra: its `hydra` node.
        alike: filled with the jobs of a sweep. Of those that differ in their seeds only, the first alone is built.
    """
    draft = Draft(cfg, [key_of(override) for override in given(hydra)])
    sources = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    groups = {path.name for source in sources for path in source.glob("*") if path.is_dir()}
    for group in hydra.runtime.choices:  # Hydra passes over a group without an option that does not exist
        if group.partition("/")[0] not in groups | {"hydra"}:
            draft.note(group, unknown(f"group {group}", group, groups))
    check_text(draft)
    key = json.dumps({k: v for k, v in draft.raw.items() if k not in ("seed", "output_dir")}, default=str)
    twin = (alike if alike is not None else {}).setdefault(key, draft)
    if twin is draft:
        check_builds(draft)
    draft.unread = twin.unread
    return draft


def checked_config(overrides: Sequence[str], config_name: str = DEFAULT_CONFIG) -> DictConfig:
    """The config of a run, for programs that are started without Hydra.

    Raises:
        ConfigError: it cannot be composed, or cannot run.
    """
    config = compose_config(overrides, config_name)
    draft = check(job_config(config, config.hydra.run.dir), config.hydra)
    if problems := problems_of([draft]):
        raise ConfigError(problems)
    return draft.cfg


def problems_of(drafts: Sequence[Draft]) -> list[str]:
    """All problems of the jobs of a command, each once: what cannot run, and what the command sets and no job reads."""
    unread = [
        drafts[0].unread[key]
        for key in drafts[0].unread
        if all(key in draft.given and key in draft.unread for draft in drafts)
    ]
    return list(dict.fromkeys([p for draft in drafts for p in draft.problems.values()] + unread))
