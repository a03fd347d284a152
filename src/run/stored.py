"""A run on the disk that is to be loaded: which run and which weights a path means, and its config with other data.

Nothing here imports torch, so that what cannot be loaded is refused at once.
"""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from config.did_you_mean import unknown
from results.runs import Run, RunError, read_run
from run.files import RESUMABLE, typed


def find_weights(path: str | Path) -> tuple[Run, Path]:
    """The run that a path means, and a checkpoint of it.

    Args:
        path: the directory of a run, for the weights that were tested, or of a run that was not tested the newest ones;
            or a checkpoint in such a directory.

    Raises:
        RunError: no run is there, or none with a checkpoint.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise RunError(f"{path} does not exist")
    if path.is_file():
        directory = next((d for d in path.absolute().parents[:2] if (d / "config.yaml").is_file()), None)
        if path.suffix != ".ckpt" or directory is None:
            raise RunError(f"{path} is no checkpoint of a run; give the run's directory, or a .ckpt file in it")
        return read_run(typed(directory)), path
    jobs = sorted(file.parent for file in path.glob("*/config.yaml") if file.parent.name != ".hydra")
    if jobs and not (path / "config.yaml").exists():
        raise RunError(f"{path} is the directory of {len(jobs)} run(s); give one of them, such as {jobs[0]}")
    run = read_run(path)
    return run, tested_checkpoint(run)


def tested_checkpoint(run: Run) -> Path:
    """The checkpoint that a run was tested with, where it lies now; the newest one of a run that was not tested.

    Raises:
        RunError: there is none.
    """
    kept = [run.directory / "checkpoints" / name for name in RESUMABLE]
    if tested := (run.summary or {}).get("checkpoint"):
        old = run.config.get("output_dir", "")
        moved = run.directory / Path(tested).relative_to(old) if Path(tested).is_relative_to(old) else Path(tested)
        kept = [moved]
    found = next((path for path in kept if path.exists()), None)
    if found is None:
        raise RunError(f"{run.directory} has no checkpoint ({', '.join(path.name for path in kept)})")
    return found


def with_other_data(config: DictConfig, changes: Sequence[str]) -> DictConfig:
    """The config of a run with other options of its data.

    Args:
        config: of the run.
        changes: such as "datamodule.test_lengths=[16,32]"; "trainer.limit_test_batches=1.0" is allowed too.

    Raises:
        RunError: a change of something else, or one that cannot be read.
    """
    known = [f"datamodule.{name}" for name in config.datamodule if not str(name).startswith("_")]
    known.append("trainer.limit_test_batches")
    for change in changes:
        key, given, _ = change.partition("=")
        if not given:
            raise RunError(f"{change}: give key=value, such as datamodule.test_lengths=[16,32]")
        if key in known:
            continue
        if key.partition(".")[0] in config and not key.startswith("datamodule"):
            raise RunError(f"{key} belongs to the training of the run; only datamodule.* can be changed")
        raise RunError(unknown(f"key {key}", key, known, list_known=False))
    try:
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist(list(changes)))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise RunError(f"{' '.join(changes)}: {' '.join(str(error).split())}") from error
    assert isinstance(merged, DictConfig)
    return merged
