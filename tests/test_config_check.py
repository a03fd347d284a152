"""Every option of every group composes and passes the check; what is wrong is named, with what to do."""

import pytest
from hydra.errors import HydraException

import config_check
from config_check import CONFIGS, compose_jobs, explain, find_problems

PRIMARIES = ["pattern_search_train", "train"]
OPTIONS = sorted(
    (group.name, option.stem) for group in CONFIGS.iterdir() if group.is_dir() for option in group.glob("*.yaml")
)


def problems(*overrides, config_name="pattern_search_train"):
    """What the check says about a command, one string a problem."""
    try:
        found = [p for cfg in compose_jobs(config_name, list(overrides)) for p in find_problems(cfg)]
    except (HydraException, ValueError) as error:
        return [explain(error, config_name, overrides)]
    return found


@pytest.mark.parametrize("primary", PRIMARIES)
@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes_and_passes(primary, group, option, monkeypatch):
    monkeypatch.setattr(
        config_check.torch.cuda, "is_available", lambda: True
    )  # trainer=gpu is right where there is one
    override = f"hydra={option}" if group == "hydra" else f"{group}={option}"
    of_a_search = group == "variant" or option.startswith("ablation")
    assert problems(override, *["optimizer=pattern_search"] * of_a_search, config_name=primary) == []


def test_every_value_has_a_comment_with_its_meaning():
    def needs_none(line):
        explained_above = line.startswith(("  task: ", "  model: ", "  optimizer: ", "  experiment: ", "  variant: "))
        return not line.strip() or line.lstrip().startswith(("#", "_", "-")) or line.endswith(":") or explained_above

    bare = [
        f"{path.relative_to(CONFIGS)}: {line}"
        for path in CONFIGS.rglob("*.yaml")
        if path.parent.name != "hydra"
        for line in path.read_text().splitlines()
        if " #" not in line and not needs_none(line)
    ]
    assert bare == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.d_modell=8"], "key model.d_modell is not known; did you mean model.d_model?"),
        (["d_model=8"], "key d_model is not known; did you mean model.d_model?"),
        (["+model.n_layer=3"], "key model.n_layer is not known; did you mean model.n_layers?"),
        (["model=gigantic"], "model=gigantic is not known. Known: large, medium, small, tiny"),
        (["model=medim"], "model=medim is not known; did you mean medium? Known: large, medium, small, tiny"),
        (["logger=null"], "logger=null: a group cannot be left out; choose one of csv, none, tensorboard, wandb"),
        (["~model"], "model is missing, and cannot be left out"),
        (["~trainer"], "trainer is missing, and cannot be left out"),
        (["optimizer=adam", "optimizer.radius=0.1"], "key optimizer.radius is not known; did you mean optimizer.lr?"),
        (["optimizer=adam", "optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
        (["foo"], "Error parsing override 'foo': give key=value"),
        (["modle=tiny"], "key modle is not known; did you mean model?"),
        (["model.d_model=wide"], "model.d_model=wide: expected int"),
        (["model.d_model=66"], "model.d_model=66 is not divisible by model.n_heads=4; try"),
        (["model.n_layers=1.5"], "model.n_layers=1.5: expected int"),
        (["model.max_len=4"], "model.max_len=4 is shorter than the longest input of the task, 16 tokens"),
        (["datamodule.test_lengths=[16]"], "use model.positions=rotary"),
        (["datamodule.n_samples=300"], "there are only 256 strings of length 8"),
        (["datamodule.n_samples=0"], "datamodule.n_samples=0 must be at least 1"),
        (["datamodule.batch_size=201"], "datamodule.batch_size=201 is larger than the training set of 200"),
        (["datamodule.group=Z_5"], "datamodule.group=Z_5 is not known; did you mean Z5"),
        (["datamodule.format=sequence"], "datamodule.format=sequence is not known. Known: seq, tag"),
        (["optimizer.radius=-1"], "radius=-1 must be above 0"),
        (["task.pattern_search_radius=big"], "task.pattern_search_radius=big: expected float"),
        (["optimizer.polls_per_step=0"], "polls_per_step=0 must be at least 1"),
        (["optimizer=adam", "optimizer.lr=fast"], "optimizer.lr=fast: expected float"),
        (["trainer.max_epoch=3"], "did you mean trainer.max_epochs?"),
        (["trainer.max_epochs=many"], "trainer.max_epochs=many: expected"),
        (["trainer.accelerator=gpu"], "this machine has no CUDA GPU; use trainer.accelerator=cpu"),
        (["trainer.precision=16-mixed"], "16-mixed hides the closure from a search"),
        (["logger.offline=False"], "run `wandb login`, or set WANDB_API_KEY"),
        (["logger.offline=perhaps"], "logger.offline=perhaps: expected bool"),
        (["seed=-1"], "seed=-1"),
        (["seed=zero"], "seed=zero: expected int"),
        (["callbacks.progress._target_=progress.Progres"], "cannot be imported"),
        (["callbacks.progress._target_=os.system"], "package os is not allowed; add it to allowed_packages"),
        (["datamodule.seed=${sed}"], "sed"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(overrides, message, monkeypatch):
    monkeypatch.setattr(config_check, "wandb_key", lambda: None)
    monkeypatch.setattr(config_check.torch.cuda, "is_available", lambda: False)
    found = problems(*overrides)
    assert len(found) == 1, found
    assert message in found[0]


def test_all_problems_are_found_at_once():
    found = problems("model.d_model=wide", "seed=-1", "+datamodule.lenght=3")
    assert len(found) == 3


def test_a_misspelt_key_in_a_yaml_file_is_found(tmp_path, monkeypatch):
    import shutil

    shutil.copytree(CONFIGS, tmp_path / "configs")
    file = tmp_path / "configs" / "model" / "tiny.yaml"
    file.write_text(file.read_text().replace("n_layers:", "n_leyers:"))
    monkeypatch.setattr(config_check, "CONFIGS", tmp_path / "configs")
    assert problems("model=tiny") == ["key model.n_leyers is not known; did you mean model.n_layers?"]


def test_every_job_of_a_sweep_is_checked():
    jobs = compose_jobs("pattern_search_train", ["optimizer=pattern_search,adam", "seed=0,1,2"], multirun=True)
    assert [(cfg.choices.optimizer, cfg.seed) for cfg in jobs] == [
        (optimizer, seed) for optimizer in ("pattern_search", "adam") for seed in (0, 1, 2)
    ]


def test_the_sweep_that_an_experiment_names_is_composed_and_the_command_line_wins():
    jobs = compose_jobs("pattern_search_train", ["experiment=ablation_z5", "seed=7"], multirun=True)
    variants = sorted(path.stem for path in (CONFIGS / "variant").glob("*.yaml"))
    assert sorted(cfg.choices.variant for cfg in jobs) == variants
    assert {(cfg.seed, cfg.datamodule.group, cfg.optimizer.max_evaluations) for cfg in jobs} == {(7, "Z5", 135_000)}
    searches = {str(dict(cfg.optimizer) | {"max_seconds": None}) for cfg in jobs}
    assert len(searches) == len(variants)  # no two are the same search


def test_packages_can_be_allowed():
    overrides = ["allowed_packages=[collections]", "+callbacks.mine._target_=collections.OrderedDict"]
    assert problems(*overrides) == []
