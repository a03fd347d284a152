"""Every option of every group composes and passes the check; what is wrong is named, with what to do."""

import os
import shutil

import pytest
import torch
from omegaconf import OmegaConf

import fuzz_config
from config import compose
from config.check import checked_config
from config.compose import CONFIGS, flags_first
from config.refusal import ConfigError, refuse
from run import wandb_account

OPTIONS = sorted(
    (group.name, option.stem) for group in CONFIGS.iterdir() if group.is_dir() for option in group.glob("*.yaml")
)


def problems(*overrides, config_name="pattern_search_train"):
    """What the check says about a command, one string a problem."""
    try:
        checked_config(overrides, config_name)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.slow
@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_passes(group, option):
    of_a_search = group == "variant" or option.startswith("ablation")
    search = "pattern_search_nodes" if option.startswith("orthogonal_") else "pattern_search"
    found = problems(f"{group}={option}", *[f"optimizer={search}"] * of_a_search)
    missing = "trainer.accelerator=gpu: this machine has no CUDA GPU; use trainer.accelerator=cpu"
    assert found == ([missing] if option == "gpu" and not torch.cuda.is_available() else [])


@pytest.mark.slow
@pytest.mark.parametrize(("group", "option"), dict(OPTIONS).items())
def test_the_other_primary_differs_in_the_optimizer_only(group, option):
    """With the last option of each group: both primaries take options alike."""
    overrides = [f"{group}={option}", *["optimizer=pattern_search"] * (group == "variant")]
    composed = [compose.compose_config(overrides, name) for name in ("pattern_search_train", "train")]
    cfg, other = (compose.job_config(config, "out") for config in composed)
    search, gradients = OmegaConf.to_container(cfg), OmegaConf.to_container(other)
    differing = {key for key in search if search[key] != gradients[key]}
    assert differing in (set(), {"optimizer", "choices"})  # Adam passes as an option of its own
    if differing:
        assert gradients["optimizer"] == OmegaConf.to_container(OmegaConf.load(CONFIGS / "optimizer/adam.yaml"))
        assert gradients["choices"] == search["choices"] | {"optimizer": "adam"}


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
        (["logger=null"], "logger=null: Config group override must be a string"),
        (["~model"], "model is missing, and cannot be left out"),
        (["~trainer"], "trainer is missing, and cannot be left out"),
        (
            ["optimizer.orthogonalise=6"],
            "key optimizer.orthogonalise belongs to optimizer=pattern_search_nodes; "
            "or add it with ++optimizer.orthogonalise=6",
        ),
        (["optimizer=adam", "optimizer.min_radius=0.1"], "; or add it with ++optimizer.min_radius=0.1"),
        (["datamodule.universe=5"], "key datamodule.universe belongs to task=membership; or add it with"),
        (["epochs=3"], "key epochs is not known; did you mean trainer.max_epochs?"),
        (["optimizer=adam", "optimizer.lr=-1"], "optimizer.lr=-1: Invalid learning rate: -1"),
        (["foo"], "foo is no option; write key=value"),
        (["modle=tiny"], "key modle is not known; did you mean model?"),
        (["model.d_model=wide"], "model.d_model=wide must be a valid integer"),
        (["model.d_model=66"], "model.d_model=66 is not divisible by model.n_heads=4; try"),
        (["model.n_layers=1.5"], "model.n_layers=1.5 must be a valid integer"),
        (["model.max_len=4"], "model.max_len=4 is shorter than the longest input of the task, 16 tokens"),
        (["datamodule.test_lengths=[16]"], "use model.positions=rotary"),
        (["datamodule.n_samples=300"], "there are only 256 strings of length 8"),
        (["datamodule.n_samples=0"], "datamodule.n_samples=0 must be at least 1"),
        (["datamodule.batch_size=201"], "datamodule.batch_size=201 is larger than the training set of 200"),
        (["datamodule.group=Z_5"], "datamodule.group=Z_5 is not known; did you mean Z5"),
        (["datamodule.format=sequence"], "datamodule.format=sequence is not known. Known: seq, tag"),
        (["optimizer.radius=-1"], "radius=-1 must be above 0"),
        (["task.pattern_search_radius=big"], "task.pattern_search_radius=big must be a valid number"),
        (["optimizer.polls_per_step=0"], "polls_per_step=0 must be at least 1"),
        (["optimizer=adam", "optimizer.lr=fast"], "optimizer.lr=fast must be a valid number"),
        (["trainer.max_epoch=3"], "did you mean trainer.max_epochs?"),
        (["trainer.max_epochs=many"], "trainer.max_epochs=many must be a valid integer"),
        (["trainer.accelerator=gpu"], "this machine has no CUDA GPU; use trainer.accelerator=cpu"),
        (["trainer.precision=16-mixed"], "16-mixed hides the closure from a search"),
        (["logger.offline=False"], "run `wandb login`, or set WANDB_API_KEY"),
        (["logger.offline=perhaps"], "logger.offline=perhaps must be a valid boolean"),
        (["seed=-1"], "seed=-1"),
        (["seed=zero"], "seed=zero must be a valid integer"),
        (["callbacks.progress._target_=run.progress.Progres"], "has no attribute 'Progres'"),
        (["callbacks.progress._target_=os.system"], "package os is not allowed; add it to allowed_packages"),
        (["datamodule.seed=${sed}"], "datamodule.seed=${sed}: Interpolation key 'sed' not found"),
        (["model.d_model=???"], "model.d_model=???: Missing mandatory value"),
        (
            ["seed=1,2"],
            "seed=1,2 has several values: add -m for a sweep, a run with each; "
            "if it is one value, a list, write seed=[1,2]",
        ),
        (["optimizer=sgd,adam"], "optimizer=sgd,adam has several values: add -m for a sweep, a run with each"),
        (
            ["task.pattern_search_radius=-1"],
            "optimizer.radius=${task.pattern_search_radius}: radius=-1 must be above 0",
        ),
        (["optimizer.memory=2"], "optimizer.memory=2 must lie in [0, 1)"),
        (["callbacks.early_stopping.monitor=val/los"], "did you mean val/loss?"),
        (["callbacks.best.mode=mini"], "callbacks.best.mode=mini: `mode` can be"),
        (
            ["+callbacks.mine._target_=torch.nn.Linear"],
            "callbacks.mine._target_=torch.nn.Linear cannot be used: it is not a Callback",
        ),
        (["optimizer._target_=torch.optim.Adamm"], "optimizer._target_=torch.optim.Adamm cannot be used"),
        (["+trainer.logger=false"], "trainer.logger is filled in by the program"),
        (["+model.vocab_size=3"], "model.vocab_size is filled in by the program"),
        (["+logger.projct=x"], "key logger.projct is not known; did you mean logger.project?"),
        (["trainer.devices=2"], "trainer.devices=2: a run uses one process"),
        (["model.d_model=1000000"], "model.d_model=1000000: a model of"),
        (["wandb=mine"], "node `wandb` is not a container"),
        (["hydra.run.dirr=x"], "did you mean hydra.run.dir?"),
        # settings that nothing would read
        (["optimizer=adam", "task.pattern_search_radius=.3"], "the optimizer does not read it"),
        (["optimizer=adam", "task.fast_polls=false"], "only a search reads it"),
        (["optimizer.radius=.3", "task.pattern_search_radius=.3"], "task.pattern_search_radius=0.3 has no effect"),
        (["model.dropout=.1"], "it is off while a search polls"),
        (["++trainer.fast_dev_run=3"], "trainer.fast_dev_run=3: Lightning would take loggers and checkpoints away"),
        (
            ["+callbacks.mine.key=3"],
            "callbacks.mine._target_ is missing, the class to build (given: callbacks.mine.key)",
        ),
        (["logger=csv", "wandb.project=mine"], "wandb.project=mine has no effect"),
        (["task=membership", "datamodule.length=20"], "datamodule.length=20 has no effect"),
        (["task=scan", "datamodule.oversample=false"], "datamodule.oversample=false has no effect"),
        (["optimizer=pattern_search_nodes", "optimizer.contraction=0.5"], "polls_per_step=0 polls no single weight"),
        (["optimizer=pattern_search_nodes", "variant=no_join"], "variant=no_join has no effect"),
        (["experiment=z5", "optimizer.rows_per_step=64"], "has no effect: batches have 32 rows"),
        (["++optimizer.search_first=true", "optimizer.join_improving=true"], "comes before the polls"),
        (["optimizer.step_lengths=[]", "optimizer.fade=3"], "optimizer.fade=3 has no effect"),
        (["optimizer.step_lengths=[]", "optimizer.weight_decay=.3"], "optimizer.weight_decay=0.3 has no effect"),
        (["variant=orthogonal_attention"], "variant=orthogonal_attention has no effect: orthogonalise=0"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0 trains nothing; -1 is no limit"),
        (["optimizer=adam", "optimizer.lr=abc"], "optimizer.lr=abc must be a valid number"),
        (["datamodule.group=Z1"], "has one element only"),
        (["datamodule.group=Q8"], "Known: parity, Z<n>, S<n>, A<n>, and products such as A4xZ5"),
        (["+trainer.min_steps=6"], "trainer.min_steps=6: a search that has stopped takes no further step"),
        (["trainer.limit_train_batches=0"], "trainer.limit_train_batches=0 trains nothing"),
        (
            ["callbacks=none", "+trainer.enable_checkpointing=false"],
            "trainer.enable_checkpointing=false: the best and the last weights",
        ),
        (["optimizer=pattern_search_nodes", "task.parameters=[head]"], "none of these matrices is among the"),
        # valid, but not written so
        (["logger.group=g"], "To append to your config use ++logger.group=g"),
        (["trainer.profiler=simple"], "To append to your config use ++trainer.profiler=simple"),
        (["callbacks.best.save_top_k=3"], "To append to your config use ++callbacks.best.save_top_k=3"),
        (["+seed=3"], "Could not append to config. An item is already at 'seed'. Either remove + prefix"),
        (["optimizer=adam", "optimizer.max_seconds=60"], "did you mean trainer.max_time?"),
        # names that were others
        (["optimizer=pattern_search_credit"], "did you mean pattern_search_nodes?"),
        (["optimizer=pattern_search_credit_long"], "did you mean pattern_search_nodes_long?"),
        (["optimizer.units_per_step=3"], "did you mean optimizer.nodes_per_step?"),
        (["callbacks.progress._target_=progress.SearchProgress"], "did you mean run.progress.SearchProgress?"),
        (["callbacks.averaging._target_=averaging.WeightAverage"], "did you mean run.averaging.WeightAverage?"),
        (["logger._target_=wandb_run.WandbRun"], "did you mean run.wandb_logger.WandbRun?"),
        # monitors
        (["callbacks.early_stopping.monitor=val/exact_match"], "use callbacks.early_stopping.mode=max"),
        (["callbacks.best.mode=max"], "of val/loss, lower is better; use callbacks.best.mode=min"),
        (
            ["+callbacks.c={_target_:lightning.pytorch.callbacks.RichProgressBar}"],
            "callbacks.c: the run shows its own progress, callbacks.progress; for this one instead add "
            "'~callbacks.progress' trainer.enable_progress_bar=true",
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(overrides, message, monkeypatch):
    monkeypatch.setattr(wandb_account, "wandb_key", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = problems(*overrides)
    assert len(found) == 1, found
    assert message in found[0]


def test_all_problems_of_a_config_that_composes_are_found_at_once():
    """First what no class gets; then all keys and types; then all ranges, since the parts are built apart."""
    assert len(problems("seed=-1", "wandb.project=null", "resume=3", "model.d_model=wide")) == 3
    found = problems(
        "datamodule.batch_size=abc",
        "model.d_model=wide",
        "model._target_=transformer.Decoder",
        "+callbacks.best.modes=min",
        "trainer.max_steps=true",
    )
    assert [text.partition(" ")[0] for text in found[:-1]] == [
        "datamodule.batch_size=abc",
        "model._target_=transformer.Decoder",
        "trainer.max_steps=true",
    ]
    assert found[-1] == "key callbacks.best.modes is not known; did you mean callbacks.best.mode?"
    found = problems("datamodule.length=0", "callbacks.best.mode=mini", "trainer.max_steps=-2")
    assert len(found) == 3


def test_what_hydra_refuses_is_told_first():
    assert problems("model=tny", "datamodule.batch_size=abc") == [
        "model=tny is not known; did you mean tiny? Known: large, medium, small, tiny"
    ]


@pytest.mark.parametrize(
    ("file", "right", "wrong", "message"),
    [
        ("model/tiny.yaml", "n_layers:", "n_leyers:", "key model.n_leyers is not known; did you mean model.n_layers?"),
        ("model/tiny.yaml", "n_layers: 1", "n_layers: 0", "model.n_layers=0 must be at least 1"),
        (
            "model/tiny.yaml",
            "_target_",
            "_targt_",
            "model._target_ is missing, the class to build (given: model._targt_,",
        ),
        ("experiment/z5.yaml", "override /model", "override /modle", "modle"),
        ("experiment/z5.yaml", "datamodule:", "datamodle:", "key datamodle is not known; did you mean datamodule?"),
        ("experiment/z5.yaml", "model: tiny", "model: tinny", "model=tinny is not known; did you mean tiny?"),
        ("pattern_search_train.yaml", "seed: 0", "sed: 0", "Interpolation key 'seed' not found"),
        ("pattern_search_train.yaml", "variant: null", "varriant: null", "group varriant is not known; did you mean"),
        (
            "pattern_search_train.yaml",
            "radius: 0.05",
            "radius: -1",
            "optimizer.radius=${task.pattern_search_radius}: radius=-1 must",
        ),
        ("optimizer/pattern_search_nodes.yaml", "${seed}", "${sead}", "Interpolation key 'sead' not found"),
    ],
)
def test_mistakes_in_yaml_files_are_found(file, right, wrong, message, tmp_path, monkeypatch):
    shutil.copytree(CONFIGS, tmp_path / "configs")
    path = tmp_path / "configs" / file
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong))
    monkeypatch.setattr(compose, "CONFIGS", tmp_path / "configs")
    found = problems("experiment=z5")
    assert any(message in problem for problem in found), found


def test_callbacks_beside_ours_are_accepted():
    bar = "+callbacks.c={_target_:lightning.pytorch.callbacks.RichProgressBar}"
    assert problems(bar, "trainer.enable_progress_bar=true") == []
    best = ["callbacks.early_stopping.monitor=val/exact_match", "callbacks.early_stopping.mode=max"]
    assert problems(*best, "callbacks.early_stopping.stopping_threshold=0.99") == []


def test_a_reason_is_told_once(capsys):
    with pytest.raises(SystemExit) as end:
        refuse(["a", "b", "a"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "This cannot run:\n  - a\n  - b\n"


def test_packages_can_be_allowed(tmp_path, monkeypatch):
    (tmp_path / "fake_callbacks.py").write_text("import lightning\nclass Mine(lightning.Callback): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    overrides = ["allowed_packages=[fake_callbacks]", "+callbacks.mine._target_=fake_callbacks.Mine"]
    assert problems(*overrides) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning has one for many a mistake
def test_random_mistakes_run_or_are_refused_by_name(monkeypatch):
    """A few cases of tests/fuzz_config.py, which runs any number of them."""
    monkeypatch.setattr(compose, "CONFIGS", CONFIGS)
    counts = fuzz_config.run(range(25), seed=7)
    assert counts["refused"] + counts["ran"] == 25
    assert counts["refused"] > 5
    assert counts["ran"] > 0


def test_flags_may_stand_between_overrides():
    words = ["model=tiny", "--config-name=train", "-cd", "a", "seed=0,1", "~callbacks.progress", "-m"]
    assert flags_first(words) == [  # as Hydra wants them
        "--config-name=train",
        "-cd",
        "a",
        "-m",
        "model=tiny",
        "seed=0,1",
        "~callbacks.progress",
    ]


def test_a_logger_is_built_by_the_check_and_leaves_the_environment_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    (problem,) = problems("+logger.log_model=3")
    assert problem.startswith("logger.log_model=3 must be a valid boolean")
    assert problems("+logger.log_model=true") == []
    assert os.environ["WANDB_MODE"] == "dryrun"


def test_a_search_has_no_learning_rate_to_log():
    monitor = "+callbacks.lr._target_=lightning.pytorch.callbacks.LearningRateMonitor"
    assert problems(monitor) == ["callbacks.lr: a search has no learning rate to log; leave it out"]
    assert problems(monitor, "optimizer=adam") == []
