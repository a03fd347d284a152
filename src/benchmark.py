"""How many candidates per second can be evaluated, by each way of evaluating them.

    python src/benchmark.py                             the default model at batch 4, 32 and 200, on one thread
    python src/benchmark.py --seconds 60 --batches 32   shorter
    python src/benchmark.py --sizes                     cost against width and depth, on models of other sizes
    python src/benchmark.py --threads 2

The ways, each measured in turn, several times over; the medians are reported:

    backward_closure   a polling optimizer under Lightning's automatic optimization: zero_grad, forward, backward
    plain              one forward per candidate, without gradients: the readable reference
    batched_inference  the plain forward of a larger batch at its best size: the ceiling without structure
    generic            vmap over the perturbed tensor, for any module (`polls/generic.py`)
    structured         rank-1 entries into the residual stream, for the transformer (`polls/structured.py`)
    structured_cores   the same, candidates spread over all cores, as a run does it

Candidates are uniform over all parameters. The last line printed is JSON, in evaluations per second.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import lightning as L
import pandas as pd
import seaborn as sns
import torch
from lightning.pytorch.utilities import disable_possible_user_warnings
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from pattern_search_task import masked_loss
from polls.generic import GenericPolls, plain_attention
from polls.structured import StructuredPolls
from polls.threads import available_cores
from run.cpu import prepare_machine
from search.closure import OneByOne, forward_only
from search.coordinates import Coordinates
from state_tracking_data import StateTrackingDataModule
from transformer import DecoderOnlyTransformer

Batch = dict[str, Tensor]
WAYS = ("backward_closure", "plain", "batched_inference", "generic", "structured", "structured_cores")
RATIOS = (("structured", "batched_inference"), ("structured", "backward_closure"), ("structured_cores", "structured"))
BATCHED_TOKENS = (512, 1024, 2048, 4096, 8192)  # sizes of the larger batch among which the best is taken
ROUNDS = 5  # of measuring every way in turn
STEP = 0.05  # by which a candidate moves its weight


class Automatic(L.LightningModule):
    """A polling optimizer under automatic optimization: every call of its closure runs forward and backward."""

    def __init__(self, model: nn.Module, polling: torch.optim.Optimizer):
        super().__init__()
        self.model, self.polling = model, polling

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return masked_loss(self.model(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.polling


class Polling(torch.optim.Optimizer):
    """Polls its closure for some seconds, one weight moved at a time."""

    def __init__(self, parameters: Iterable[nn.Parameter], seconds: float):
        super().__init__(parameters, {})
        self.coordinates, self.seconds, self.rate = Coordinates(self.param_groups[0]["params"]), seconds, 0.0

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        every, generator = torch.arange(len(self.coordinates)), torch.Generator().manual_seed(0)
        self.rate = poll_rate(OneByOne(closure, self.coordinates), every, 1, generator, self.seconds)


def rate_of(call: Callable[[], Any], seconds: float) -> float:
    """Calls of a function per second; it is called at least once."""
    done, start = 0, time.perf_counter()
    while not done or time.perf_counter() - start < seconds:
        call()
        done += 1
    return done / (time.perf_counter() - start)


def backward_rate(model: nn.Module, batch: Batch, seconds: float) -> float:
    """Evaluations per second of a polling optimizer that Lightning drives by automatic optimization."""
    polling = Polling(model.parameters(), seconds)
    loader = DataLoader(TensorDataset(batch["x"], batch["y"]), batch_size=len(batch["x"]))
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = dict.fromkeys(silent, False)
    L.Trainer(max_steps=1, accelerator="cpu", **options).fit(Automatic(model, polling), loader)
    model.zero_grad()
    return polling.rate


def inference_rate(model: nn.Module, batch: Batch, seconds: float) -> float:
    """Batches per second of the plain forward, several of them at a time, at the best number of them."""
    copies = sorted({max(1, n // batch["x"].numel()) for n in BATCHED_TOKENS})

    def rate(n: int) -> float:
        x, y = batch["x"].repeat(n, 1), batch["y"].repeat(n, 1)
        return n * rate_of(lambda: masked_loss(model(x), y), seconds / len(copies))

    with forward_only(model):
        return max(map(rate, copies))


def poll_rate(closure: Any, weights: Tensor, block: int, generator: torch.Generator, seconds: float) -> float:
    """Evaluations per second of polls of as many candidates as `block`, drawn from some weights (n,)."""

    def poll() -> None:
        sign = torch.randint(2, (block,), generator=generator) * 2.0 - 1
        closure.poll(weights[torch.randint(len(weights), (block,), generator=generator)], (STEP * sign).double())

    return block * rate_of(poll, seconds)


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    return masked_loss(logits, batch["y"])


def measure(
    model: DecoderOnlyTransformer, batch: Batch, ways: Iterable[str], seconds: float, block: int | None = None
) -> dict[str, float]:
    """Median evaluations per second of each way, measured in turn for `seconds` in all, `block` candidates per poll."""
    coordinates, generator = Coordinates(model.parameters()), torch.Generator().manual_seed(0)

    def polls(closure: Any) -> Callable[[float], float]:
        return partial(poll_rate, closure, torch.arange(len(coordinates)), block or max(closure.block, 8), generator)

    structured = partial(StructuredPolls, model, coordinates, loss_of)
    rate_in: dict[str, Callable[[float], float]] = {  # seconds -> evaluations per second
        "backward_closure": partial(backward_rate, model, batch),
        "plain": polls(OneByOne(lambda: loss_of(model(batch["x"]), batch), coordinates)),
        "batched_inference": partial(inference_rate, model, batch),
        "generic": polls(GenericPolls(model, coordinates, loss_of).on(batch)),
        "structured": polls(structured(torch.get_num_threads()).on(batch)),
        "structured_cores": polls(structured(available_cores()).on(batch)),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS + 1):
        for way, measured in rates.items():
            measured.append(rate_in[way](seconds / len(rates) / (ROUNDS + 1)))
    return {way: median(measured[1:]) for way, measured in rates.items()}  # the first round warms up


def measure_classes(model: DecoderOnlyTransformer, batch: Batch, seconds: float) -> pd.DataFrame:
    """One row per class of parameter: how many weights, and evaluations per second of structured polls of it alone."""
    coordinates, generator = Coordinates(model.parameters()), torch.Generator().manual_seed(0)
    parts: dict[str, list[Tensor]] = {}
    for (name, p), end in zip(model.named_parameters(), coordinates.ends, strict=True):
        layer = name.rsplit(".", 1)[0].removeprefix("blocks.")
        parts.setdefault(layer, []).append(torch.arange(end - p.numel(), end))
    closure, classes = StructuredPolls(model, coordinates, loss_of).on(batch), {}
    for layer, weights in ((layer, torch.cat(part)) for layer, part in parts.items()):
        rate_in = partial(poll_rate, closure, weights, closure.block, generator)
        rate_in(0)  # warms up
        classes[layer] = len(weights), rate_in(seconds / len(parts))
    return pd.DataFrame.from_dict(classes, orient="index", columns=["weights", "evaluations/s"])


def matrix_product_peak(seconds: float = 1.0) -> float:
    """GFLOP/s of a large float32 matrix product, at the current number of threads."""
    a, b, out = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)
    return rate_of(lambda: torch.mm(a, b, out=out), seconds) * 2 * 1024**3 / 1e9


def flops(model: DecoderOnlyTransformer, batch: Batch) -> tuple[float, float]:
    """Floating point operations of the matrix products of a plain forward, and of a candidate of structured polls.

    They are counted as they are called; the candidates are spread evenly over all weights.
    """
    coordinates = Coordinates(model.parameters())
    closure, chosen = (
        StructuredPolls(model, coordinates, loss_of).on(batch),
        torch.arange(256) * len(coordinates) // 256,
    )
    closure()  # what the incumbent computes is no candidate's
    with forward_only(model), plain_attention(), FlopCounterMode(display=False) as whole:
        model(batch["x"])
    with FlopCounterMode(display=False) as left:
        closure.poll(chosen, torch.full((len(chosen),), STEP, dtype=torch.float64))
    return whole.get_total_flops(), left.get_total_flops() / len(chosen)


def make_model(data: StateTrackingDataModule, d_model: int = 64, n_layers: int = 2) -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    return DecoderOnlyTransformer(data.vocab_size, data.n_classes, data.max_len, d_model=d_model, n_layers=n_layers)


def batch_of(data: StateTrackingDataModule, size: int) -> Batch:
    split = data.splits["train"]
    return {"x": split.x[:size], "y": split.y[:size]}


def draw_rates(rates: pd.DataFrame, path: Path, title: str) -> None:
    """Bars of evaluations per second by way (rows) and batch (columns), on a logarithmic axis."""
    table = rates.rename_axis("way").reset_index().melt("way", var_name="batch", value_name="evaluations per second")
    sns.set_theme(style="whitegrid", context="notebook")
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panel = figure.subplots()
    sns.barplot(table, x="batch", y="evaluations per second", hue="way", ax=panel)
    panel.set(yscale="log", xlabel="", title=title)
    for bars in panel.containers:
        if isinstance(bars, BarContainer):
            panel.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    sns.move_legend(panel, "center left", bbox_to_anchor=(1, 0.5), title=None, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def measure_batches(data: StateTrackingDataModule, args: argparse.Namespace) -> None:
    """Every way at every batch size, and structured polls by class of parameter; draws the figure."""
    model, seconds = make_model(data), 0.85 * args.seconds / len(args.batches)
    n_weights, batches = sum(p.numel() for p in model.parameters()), {n: batch_of(data, n) for n in args.batches}
    rates = pd.DataFrame({str(n): measure(model, batch, WAYS, seconds, args.block) for n, batch in batches.items()})
    ratios = pd.DataFrame({f"{a} / {b}": rates.loc[a] / rates.loc[b] for a, b in RATIOS}).T
    peak, names = matrix_product_peak(), ["a whole forward", "what structured polls leave"]
    bounds = peak * 1e9 / pd.DataFrame({str(n): flops(model, batch) for n, batch in batches.items()}, index=names)
    bounds.index += f" at {peak:.0f} GFLOP/s"
    title = f"Evaluations per second: {n_weights:,} weights, 16 tokens, {args.threads} thread(s)"
    table = pd.concat([rates.map("{:,.0f}".format), ratios.map("{:.2f} x".format), bounds.map("{:,.0f}".format)])
    print(f"{title}\n{table.add_prefix('batch ').to_string()}\n")

    size = 32 if 32 in args.batches else args.batches[0]
    classes = measure_classes(model, batch_of(data, size), 0.1 * args.seconds)
    times = classes["weights"] / classes["evaluations/s"]
    classes["share of weights"], classes["share of the time"] = classes["weights"] / n_weights, times / times.sum()
    formats = ("{:,}".format, "{:,.0f}".format, "{:.1%}".format, "{:.1%}".format)
    print(f"Structured polls by class of parameter, batch {size}\n{classes.to_string(formatters=formats)}\n")
    draw_rates(rates.add_prefix("batch "), args.output, title)
    print(f"Figure: {args.output}")
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 256, "weights": n_weights, "tokens": data.max_len}
    print(json.dumps({"threads": args.threads, "model": sizes, "batch": rates.to_dict()}))


def measure_sizes(data: StateTrackingDataModule, args: argparse.Namespace) -> None:
    """Structured polls against batched inference over width and depth, at the first batch size."""
    grid = [*((d, 2) for d in (16, 32, 64, 128, 256, 512)), *((64, n) for n in (1, 4, 8, 12)), (128, 4), (256, 6)]
    ways, batch, rows = ["batched_inference", "structured"], batch_of(data, args.batches[0]), []
    for d_model, n_layers in grid:  # the last two: medium and large
        model = make_model(data, d_model, n_layers)
        rates = measure(model, batch, ways, args.seconds / len(grid), args.block or 192)
        (full, left), weights = flops(model, batch), sum(p.numel() for p in model.parameters())
        rows.append(
            {"d_model": d_model, "n_layers": n_layers, "weights": weights, **rates, "of operations": full / left}
        )
    table = pd.DataFrame(rows)
    table["ratio"] = table["structured"] / table["batched_inference"]
    formats = dict.fromkeys(("weights", *ways), "{:,.0f}".format)
    formats |= dict.fromkeys(("of operations", "ratio"), "{:.1f} x".format)
    print(f"Cost against size, batch {args.batches[0]}, {args.threads} thread(s)")
    print(table.to_string(index=False, formatters=formats))
    widths, depths = table[table["n_layers"] == 2], table[table["d_model"] == 64]
    for name, axis, some in (("width", "d_model", widths), ("depth", "n_layers", depths)):
        slopes = {way: linear_regression(some[axis].map(math.log), -some[way].map(math.log)).slope for way in ways}
        powers = ", ".join(f"{way} {slope:.2f}" for way, slope in slopes.items())
        print(f"Seconds per evaluation grow with the {name} to the power: {powers}")
    found = table[["d_model", "n_layers", *ways]].to_dict("records")
    print(json.dumps({"threads": args.threads, "batch": args.batches[0], "sizes": found}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 32, 200], help="sequences per batch, up to 200")
    parser.add_argument("--seconds", type=float, default=150, help="of measuring in all")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--block", type=int, help="candidates per poll; as many as each way likes best if left out")
    parser.add_argument("--sizes", action="store_true", help="measure models of other widths and depths instead")
    parser.add_argument("--output", type=Path, default=Path("benchmark.png"), help="the figure to write")
    args = parser.parse_args()
    if any(not 1 <= batch <= 200 for batch in args.batches) or args.seconds <= 0 or args.threads < 1:
        parser.error("--batches takes sizes from 1 to 200, --seconds and --threads positive numbers")
    disable_possible_user_warnings()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    prepare_machine(args.threads)
    measure_all = measure_sizes if args.sizes else measure_batches
    measure_all(StateTrackingDataModule(), args)


if __name__ == "__main__":
    main()
