"""On a GPU: fast polls give the losses and slopes of the CPU, optimizers train, runs go on. Skipped where none is."""

import copy
import shlex

import pandas as pd
import pytest
import torch

from commands import SHORT, run, run_dirs
from config.compose import CONFIGS
from pattern_search_task import batch_loss
from polls.make import make_polls
from polls.sizes import GPU
from search.coordinates import Coordinates
from soak_kill import differences, results

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
OPTIMIZERS = sorted(path.stem for path in (CONFIGS / "optimizer").glob("*.yaml"))


@pytest.fixture
def closures(parity, model):
    """The closure of a batch on each device, in float64, with the sizes of a GPU on both."""
    split, made = parity.splits["train"], []
    batch = {"x": split.x[:24], "y": split.y[:24]}
    for device in ("cpu", "cuda"):
        moved = copy.deepcopy(model).to(device, torch.float64)
        polls = make_polls(moved, Coordinates(moved.parameters()), batch_loss)
        polls.sizes = GPU
        made.append(polls.on({name: part.to(device) for name, part in batch.items()}))
    return made


def test_candidates_have_the_losses_that_the_cpu_finds(closures):
    n = len(closures[0].coordinates)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(n, (500,), generator=generator)
    steps = 0.1 * torch.randn(500, dtype=torch.float64, generator=generator)
    changes = 0.02 * torch.randn(12, n, dtype=torch.float64, generator=generator)
    scales = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)
    found = []
    for closure in closures:
        on = closure.model.head.weight.device
        polled = closure.poll(chosen, steps)
        tried = closure.trial(changes[0].to(on), scales)
        perturbed = closure.perturbed(12, lambda first, last, on=on: changes[first:last].to(on))
        generic = closure.generic.poll(chosen[:50], steps[:50])
        moved = closure.generic.perturbed(12, lambda first, last, on=on: changes[first:last].to(on))
        found.append([closure(), polled, tried, perturbed, generic, moved])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    assert found[0][1].unique().numel() > 400


def test_nodes_have_the_slopes_that_the_cpu_finds(closures):
    nodes = torch.randperm(closures[0].n_nodes, generator=torch.Generator().manual_seed(1))
    steps = torch.full((len(nodes),), 0.05, dtype=torch.float64)
    found = [closure.nodes(nodes, steps, torch.Generator().manual_seed(2)) for closure in closures]
    torch.testing.assert_close(*[[part.cpu() for part in parts] for parts in found], rtol=1e-9, atol=1e-12)
    assert found[0][1].all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains(optimizer, tmp_path):
    steps = ["trainer.max_steps=3", *SHORT[1:]]
    words = ["model=tiny", "trainer=gpu", f"optimizer={optimizer}", "logger=none", *steps]
    done = run(shlex.join(["python", "src/train.py", *words]), tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("metrics.csv")
    table = pd.read_csv(file)
    assert table[table.metric == "train/loss"].value.between(0, 10).all()


@pytest.mark.parametrize("optimizer", ["pattern_search", "pattern_search_nodes", "pattern_search_nodes_decay", "es"])
def test_a_run_that_was_stopped_ends_as_its_twin_that_was_left_alone(optimizer, tmp_path):
    def train(name, *more):
        words = ["model=tiny", "trainer=gpu", f"optimizer={optimizer}", "logger=none", *more]
        done = run(shlex.join(["python", "src/train.py", *words]), tmp_path / name)
        assert done.returncode == 0, done.stderr
        return run_dirs(tmp_path / name)[0]

    twin = train("twin", "trainer.max_epochs=2", "checkpoint.every_steps=1")
    stopped = train("stopped", "trainer.max_epochs=2", "checkpoint.every_steps=1", "trainer.max_steps=5")
    train("stopped", "trainer.max_epochs=2", "checkpoint.every_steps=1", f"resume={stopped}")
    assert list(differences(results(twin), results(stopped))) == []
