"""How many candidates per second can be evaluated, by each way of evaluating them.

    python src/benchmark.py                             the default model at batch 4, 32 and 200, on one thread
    python src/benchmark.py --seconds 60 --batches 32   shorter
    python src/benchmark.py --models tiny small medium --batches 32     against the number of weights
    python src/benchmark.py --startup                   seconds and memory that commands take beside the libraries alone

The ways, each measured in turn, several times over; the medians are reported:

    backward_closure   a forward and a backward per candidate, as a closure of automatic optimization runs them
    plain              one forward per candidate, without gradients: the readable reference
    batched_inference  the plain forward of a larger batch at its best size: the ceiling without structure
    generic            vmap over the perturbed tensor, for any module (`polls/generic.py`)
    structured         rank-1 entries into the residual stream, for the transformer (`polls/structured.py`)
    structured_cores   the same, candidates spread over all cores, as a run does it
    perturbed          all weights moved along random directions, drawn anew for each pair of candidates
    perturbed_generic  the same by vmap over all tensors, for any module

Candidates of the others are uniform over all parameters. The last line printed is JSON, in evaluations per second.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from config.compose import CONFIGS
from config.did_you_mean import unknown
from pattern_search_task import Batch, batch_loss
from polls.generic import GenericPolls
from polls.structured import StructuredPolls
from polls.threads import available_cores
from results.runs import RunError
from results.startup import measure_startup
from run.cpu import prepare_machine
from search.closure import OneByOne, forward_only
from search.coordinates import Coordinates
from search.random_directions import RandomDirections
from state_tracking_data import StateTrackingDataModule
from transformer import DecoderOnlyTransformer

RATIOS = (
    ("structured", "batched_inference"), ("structured", "backward_closure"), ("structured_cores", "structured"),
    ("perturbed", "batched_inference"),
)  # fmt: skip
BATCHED_TOKENS = (512, 1024, 2048, 4096, 8192)  # sizes of the larger batch among which the best is taken
ROUNDS = 5  # of measuring every way in turn
STEP = 0.05  # by which a candidate moves its weight

Rate = Callable[[float], float]  # seconds of measuring -> evaluations per second


def rate_of(call: Callable[[], Any], seconds: float) -> float:
    """Calls of a function per second."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return 1 / timer.blocked_autorange(min_run_time=seconds).median


def ways(model: DecoderOnlyTransformer, batch: Batch) -> dict[str, Rate]:
    """What measures each way of evaluating candidates."""
    coordinates, generator = Coordinates(model.parameters()), torch.Generator().manual_seed(0)

    def polls(closure: Any) -> Rate:
        block = max(closure.block, 8)

        def poll() -> None:
            steps = STEP * (torch.randint(2, (block,), generator=generator) * 2.0 - 1).double()
            closure.poll(torch.randint(len(coordinates), (block,), generator=generator), steps)

        return lambda seconds: block * rate_of(poll, seconds)

    def perturbed(closure: Any) -> Rate:
        like = torch.empty(len(coordinates), device=batch["x"].device)
        pairs = 32 if like.is_cpu else 1024  # two chunks and more

        def perturb() -> None:
            seeds = torch.randint(2**63 - 1, (pairs,), generator=generator)
            directions = RandomDirections(lambda d, own: d.normal_(generator=own), seeds, like)
            closure.perturbed(2 * pairs, directions.changes(STEP, mirrored=True))

        return lambda seconds: 2 * pairs * rate_of(perturb, seconds)

    def forward(batch: Batch) -> Tensor:
        return batch_loss(model(batch["x"]), batch)

    @torch.enable_grad()
    def backward() -> Tensor:
        model.zero_grad()
        loss = forward(batch)
        loss.backward()
        return loss

    def batched_inference(seconds: float) -> float:
        more = 1 if batch["x"].is_cpu else 256  # a GPU wants more at a time
        copies, rates = sorted({max(1, more * n // batch["x"].numel()) for n in BATCHED_TOKENS}), []
        for n in copies:
            larger = {name: part.repeat(n, 1) for name, part in batch.items()}
            rates.append(n * rate_of(partial(forward, larger), seconds / len(copies)))
        return max(rates)

    return {
        "backward_closure": polls(OneByOne(backward, coordinates)),
        "plain": polls(OneByOne(partial(forward, batch), coordinates)),
        "batched_inference": batched_inference,
        "generic": polls(GenericPolls(model, coordinates, batch_loss).on(batch)),
        "structured": polls(StructuredPolls(model, coordinates, batch_loss, torch.get_num_threads()).on(batch)),
        "structured_cores": polls(StructuredPolls(model, coordinates, batch_loss, available_cores()).on(batch)),
        "perturbed": perturbed(StructuredPolls(model, coordinates, batch_loss, torch.get_num_threads()).on(batch)),
        "perturbed_generic": perturbed(GenericPolls(model, coordinates, batch_loss).on(batch)),
    }


def measure(model: DecoderOnlyTransformer, batch: Batch, seconds: float) -> dict[str, float]:
    """Median evaluations per second of each way, measured in turn for `seconds` in all."""
    rate_in = ways(model, batch)
    rates: dict[str, list[float]] = {way: [] for way in rate_in}
    with forward_only(model):
        for _ in range(ROUNDS + 1):
            for way, measured in rates.items():
                measured.append(rate_in[way](seconds / len(rates) / (ROUNDS + 1)))
    return {way: median(measured[1:]) for way, measured in rates.items()}  # the first round warms up


def bound(model: DecoderOnlyTransformer, batch: Batch) -> float:
    """Evaluations per second if nothing but the matrix products of structured polls took time.

    The products are counted as they are called, for candidates spread evenly over all weights; they run at the speed of
    a large one.
    """
    coordinates = Coordinates(model.parameters())
    closure = StructuredPolls(model, coordinates, batch_loss, 1).on(batch)
    chosen = torch.arange(256) * len(coordinates) // 256
    closure()  # what the incumbent computes is no candidate's
    with FlopCounterMode(display=False) as counter:
        closure.poll(chosen, torch.full((len(chosen),), STEP, dtype=torch.float64))
    n, device = (1024, "cpu") if model.head.weight.is_cpu else (8192, "cuda")
    a, b, out = torch.randn(3, n, n, device=device)
    peak = rate_of(lambda: torch.mm(a, b, out=out), 0.5) * 2 * n**3  # operations per second
    return peak / (counter.get_total_flops() / len(chosen))


def model_of(name: str, data: StateTrackingDataModule) -> DecoderOnlyTransformer:
    """The model of configs/model/NAME.yaml; RunError if there is none."""
    path = CONFIGS / "model" / f"{name}.yaml"
    if not path.exists():
        known = (other.stem for other in sorted(path.parent.glob("*.yaml")))
        raise RunError(unknown(f"--models {name}", name, known))
    torch.manual_seed(0)
    return instantiate(OmegaConf.load(path), vocab_size=data.vocab_size, n_classes=data.n_classes, max_len=data.max_len)


def draw(rates: pd.DataFrame, weights: list[int], title: str) -> Figure:
    """Evaluations per second: against the number of weights if there are several models, else against the batch."""
    if len(set(weights)) > 1:
        lines = rates.T.assign(weights=weights).groupby("weights").mean()  # over the batches
        panel = lines.plot(loglog=True, marker="o", figsize=(9, 4.5), title=title)
        panel.set(xlabel="weights", ylabel="evaluations per second")
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        panel = rates.T.plot.bar(logy=True, rot=0, figsize=(9, 4.5), title=title)
    return panel.figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 32, 200], help="sequences per batch, up to 200")
    parser.add_argument("--models", nargs="+", default=["small"], metavar="NAME", help="options of configs/model")
    parser.add_argument("--seconds", type=float, default=150, help="of measuring; more if calls are long")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the weights")
    parser.add_argument("--startup", action="store_true", help="measure how commands start instead")
    parser.add_argument("--output", type=Path, default=Path("benchmark.png"), help="the figure to write")
    args = parser.parse_args()
    if not all(1 <= batch <= 200 for batch in args.batches):
        parser.error("--batches takes sizes from 1 to 200")
    if args.startup:
        print(json.dumps(measure_startup(rounds=3, console=Console())))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA GPU")
    prepare_machine(args.threads)
    data = StateTrackingDataModule()
    split = data.splits["train"]
    try:
        models = {name: model_of(name, data).to(args.device) for name in args.models}
    except RunError as error:
        parser.error(str(error))
    seconds = args.seconds / len(args.batches) / len(models)
    measured, bounds, weights = {}, {}, []
    for (name, model), n in itertools.product(models.items(), args.batches):
        batch = {"x": split.x[:n].to(args.device), "y": split.y[:n].to(args.device)}
        column = f"{name}, batch {n}"
        measured[column], bounds[column] = measure(model, batch, seconds), bound(model, batch)
        weights.append(sum(p.numel() for p in model.parameters()))
    rates = pd.DataFrame(measured)
    ratios = pd.DataFrame({f"{a} / {b}": rates.loc[a] / rates.loc[b] for a, b in RATIOS}).T
    left = pd.DataFrame({"what is left of the operations": bounds}).T
    table = pd.concat([rates.map("{:,.0f}".format), ratios.map("{:.2f} x".format), left.map("{:,.0f}".format)])
    sizes = ", ".join(f"{name} {sum(p.numel() for p in model.parameters()):,}" for name, model in models.items())
    where = f"{args.threads} thread(s)" if args.device == "cpu" else torch.cuda.get_device_name()
    title = f"Evaluations per second: weights {sizes}; {data.max_len} tokens, {where}"
    print(f"{title}\n{table.to_string()}\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(rates, weights, title).savefig(args.output, dpi=120, bbox_inches="tight")
    print(f"Figure: {args.output}")
    by_model = {
        name: {"weights": count, "batch": {str(n): measured[f"{name}, batch {n}"] for n in args.batches}}
        for name, count in zip(models, weights[:: len(args.batches)], strict=True)
    }
    first = next(iter(by_model.values()))
    more = {"models": by_model} if len(by_model) > 1 else {}
    print(json.dumps({"device": args.device, "threads": args.threads} | first | more))


if __name__ == "__main__":
    main()
