"""How many candidates a second can be evaluated, by each way of evaluating them.

    python src/benchmark.py                             the default model at batch 4, 32 and 200, on one thread
    python src/benchmark.py --seconds 60 --batches 32   shorter
    python src/benchmark.py --sizes                     cost against width and depth, on models of other sizes
    python src/benchmark.py --threads 2

The ways, each measured in turn, several times over; the medians are reported:

    backward_closure   a polling optimizer under Lightning's automatic optimization: zero_grad, forward, backward
    plain              one forward a candidate, without gradients: the readable reference
    batched_inference  the plain forward of a larger batch at its best size: the ceiling without structure
    generic            vmap over the perturbed tensor, for any module (`polls/generic.py`)
    structured         rank-1 entries into the residual stream, for the transformer (`polls/structured.py`)
    structured_cores   the same, candidates spread over all cores, as a run does it

Candidates are uniform over all parameters. The last line printed is JSON, in evaluations a second.
"""

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pandas as pd
import seaborn as sns
import torch
from lightning.pytorch.utilities import disable_possible_user_warnings
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.sequences import IGNORE
from pattern_search_task import masked_loss
from polls.generic import GenericPolls
from polls.structured import StructuredPolls
from polls.threads import available_cores
from run.cpu import keep_freed_memory
from search.closure import OneByOne, forward_only
from search.coordinates import Coordinates
from state_tracking_data import StateTrackingDataModule
from transformer import DecoderOnlyTransformer

WAYS = ["backward_closure", "plain", "batched_inference", "generic", "structured", "structured_cores"]
BATCHED_TOKENS = (512, 1024, 2048, 4096, 8192)  # sizes of the larger batch among which the best is taken
ROUNDS = 5  # of measuring every way in turn


class Automatic(L.LightningModule):
    """A polling optimizer under automatic optimization: every call of its closure runs forward and backward."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], seconds: float):
        super().__init__()
        self.model, self.batch, self.seconds = model, batch, seconds

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return masked_loss(self.model(batch["x"]), batch["y"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Polling(self.model.parameters(), self.seconds)

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.batch], batch_size=None)


class Polling(torch.optim.Optimizer):
    """Calls its closure for some seconds, with one weight moved each time."""

    def __init__(self, params, seconds: float):
        super().__init__(params, {"seconds": seconds})
        self.rate = 0.0

    def step(self, closure: Callable) -> None:
        coordinates = Coordinates(self.param_groups[0]["params"])
        chosen = torch.randint(len(coordinates), (4096,)).tolist()
        self.rate = rate_of(lambda k: one_move(coordinates, chosen[k % 4096], closure), self.param_groups[0]["seconds"])


def one_move(coordinates: Coordinates, coordinate: int, closure: Callable) -> int:
    with torch.no_grad():
        p, index, weight = coordinates.move_one(coordinate, 0.05)
    closure()
    with torch.no_grad():
        p[index] = weight
    return 1


def rate_of(evaluate: Callable[[int], int], seconds: float) -> float:
    """Evaluations a second of `evaluate(k)`, which returns how many it made; at least one call is made."""
    done, calls, start = 0, 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or calls == 0:
        done += evaluate(calls)
        calls += 1
    return done / elapsed if elapsed else done / (time.perf_counter() - start)


def measure(
    model: DecoderOnlyTransformer, batch: dict[str, Tensor], ways: list[str], seconds: float, block: int | None = None
) -> dict[str, float]:
    """Median evaluations a second of each way, measured in turn for `seconds` in all, `block` candidates a poll."""
    coordinates = Coordinates(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return masked_loss(logits, batch["y"])

    def draw(n: int) -> tuple[Tensor, Tensor]:
        sign = torch.randint(2, (n,), generator=generator) * 2.0 - 1
        return torch.randint(len(coordinates), (n,), generator=generator), (0.05 * sign).double()

    def polls(closure) -> Callable[[int], int]:
        return lambda k: len(closure.poll(*draw(block or max(closure.block, 8))))

    tokens = batch["x"].numel()
    larger = {
        copies: {name: value.repeat(copies, 1) for name, value in batch.items()}
        for copies in sorted({max(1, n // tokens) for n in BATCHED_TOKENS})
    }

    def inference(copies: int) -> Callable[[int], int]:
        def evaluate(k: int) -> int:
            masked_loss(model(larger[copies]["x"]), larger[copies]["y"])
            return copies

        return evaluate

    evaluators = {
        "plain": polls(OneByOne(lambda: loss(model(batch["x"]), batch), coordinates)),
        "generic": polls(GenericPolls(model, coordinates, loss).on(batch)),
        "structured": polls(StructuredPolls(model, coordinates, loss, torch.get_num_threads()).on(batch)),
        "structured_cores": polls(StructuredPolls(model, coordinates, loss, available_cores()).on(batch)),
    }
    share = seconds / len(ways) / (ROUNDS + 1)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):  # the first round warms up
        for way in ways:
            if way == "backward_closure":
                rate = backward_rate(model, batch, share)
            else:
                with forward_only(model):
                    if way == "batched_inference":
                        rate = max(rate_of(inference(copies), share / len(larger)) for copies in larger)
                    else:
                        rate = rate_of(evaluators[way], share)
            if turn:
                rates[way].append(rate)
    return {way: statistics.median(measured) for way, measured in rates.items()}


def backward_rate(model: nn.Module, batch: dict[str, Tensor], seconds: float) -> float:
    """Evaluations a second of a polling optimizer that Lightning drives by automatic optimization."""
    task = Automatic(model, batch, seconds)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(max_steps=1, accelerator="cpu", **quiet)
    trainer.fit(task)
    for p in model.parameters():
        p.grad = None
    return trainer.optimizers[0].rate


def measure_classes(
    model: DecoderOnlyTransformer, batch: dict[str, Tensor], seconds: float
) -> dict[str, tuple[int, float]]:
    """Of each class of parameter: how many weights, and evaluations a second of structured polls of it alone."""
    named = dict(model.named_parameters())
    coordinates = Coordinates(named.values())
    starts = [end - p.numel() for end, p in zip(coordinates.ends, named.values(), strict=True)]
    classes: dict[str, list[Tensor]] = {}
    for (name, p), start in zip(named.items(), starts, strict=True):
        layer = name.rsplit(".", 1)[0].removeprefix("blocks.")
        classes.setdefault(layer, []).append(torch.arange(start, start + p.numel()))
    closure = StructuredPolls(model, coordinates, lambda logits, batch: masked_loss(logits, batch["y"])).on(batch)
    result = {}
    with forward_only(model):
        for name, parts in classes.items():
            own = torch.cat(parts)
            block = own[torch.randint(len(own), (closure.block,))]
            steps = torch.full((len(block),), 0.05, dtype=torch.float64)
            closure.poll(block, steps)
            result[name] = (
                len(own),
                rate_of(lambda k, b=block, s=steps: len(closure.poll(b, s)), seconds / len(classes)),
            )
    return result


def matrix_product_peak(seconds: float = 1.0) -> float:
    """GFLOP/s of a large float32 matrix product, at the current number of threads."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return rate_of(lambda k: 1 if torch.mm(a, b) is not None else 0, seconds) * 2 * 1024**3 / 1e9


def flops(model: DecoderOnlyTransformer, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Floating point operations of a plain forward, and of what is left of it for a candidate of structured polls.

    A multiplication and an addition for every weight of a matrix and token, and those of attention. A candidate
    runs the stages behind its own: the first without the projections that its rank-1 entry spares, the last block
    at the scored positions only. The mean is over all weights, which the stage that holds them runs for nothing.
    """
    tokens, scored, d = batch["x"].numel(), int((batch["y"] != IGNORE).sum()), model.head.in_features
    heads, length, hidden = (
        model.blocks[0].attention.n_heads,
        batch["x"].shape[1],
        model.blocks[0].ff.inner.out_features,
    )
    whole, entered, weights = [], [], [model.token_embedding.weight.numel()]  # of each stage, the embedding's first
    for block in model.blocks:
        at = scored if block is model.blocks[-1] else tokens  # the positions that are computed
        whole += [2 * (2 * (at + tokens) * d * d + 2 * at * length * d), 4 * at * d * hidden]
        entered += [2 * at * length * heads * d, 2 * at * d * hidden]
        weights += [4 * d * d, 2 * d * hidden]
    full = len(model.blocks) * 2 * tokens * (4 * d * d + 2 * length * d + 2 * d * hidden)
    left = [entered[s] + sum(whole[s + 1 :]) for s in range(len(whole))] + [
        0
    ]  # behind the embedding, the first stage ..
    return full, sum(n * f for n, f in zip(weights, left, strict=True)) / sum(weights)


def make_model(data: StateTrackingDataModule, **sizes: int) -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    return DecoderOnlyTransformer(data.vocab_size, data.n_classes, data.max_len, **sizes)


def batch_of(data: StateTrackingDataModule, size: int) -> dict[str, Tensor]:
    split = data.splits["train"]
    return {"x": split.x[:size], "y": split.y[:size]}


def show(console: Console, title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def draw(rates: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """Bars of evaluations a second by way and batch, on a logarithmic axis."""
    rows = [(f"batch {batch}", way, rate) for batch, of in rates.items() for way, rate in of.items()]
    table = pd.DataFrame(rows, columns=["batch", "way", "evaluations a second"])
    sns.set_theme(style="whitegrid", context="notebook")
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panel = figure.subplots()
    sns.barplot(table, x="batch", y="evaluations a second", hue="way", ax=panel)
    panel.set(yscale="log", xlabel="", title=title)
    for bars in panel.containers:
        panel.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    sns.move_legend(panel, "center left", bbox_to_anchor=(1, 0.5), title=None, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 32, 200], help="sequences a batch, up to 200")
    parser.add_argument("--seconds", type=float, default=150, help="of measuring in all")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--block", type=int, help="candidates a poll; as many as each way likes best if left out")
    parser.add_argument("--sizes", action="store_true", help="measure models of other widths and depths instead")
    parser.add_argument("--output", type=Path, default=Path("benchmark.png"), help="the figure to write")
    args = parser.parse_args()
    if any(not 1 <= batch <= 200 for batch in args.batches) or args.seconds <= 0 or args.threads < 1:
        parser.error("--batches takes sizes from 1 to 200, --seconds and --threads positive numbers")
    disable_possible_user_warnings()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    console, data = Console(), StateTrackingDataModule()
    if args.sizes:
        measure_sizes(console, data, args)
        return
    model = make_model(data)
    n_weights = sum(p.numel() for p in model.parameters())
    rates = {
        str(size): measure(model, batch_of(data, size), WAYS, 0.85 * args.seconds / len(args.batches), args.block)
        for size in args.batches
    }
    title = f"Evaluations a second: {n_weights:,} weights, 16 tokens, {args.threads} thread(s)"
    rows = [[way, *(f"{rates[b][way]:,.0f}" for b in rates)] for way in WAYS]
    over = [("structured", "batched_inference"), ("structured", "backward_closure"), ("structured_cores", "structured")]
    for way, other in over:
        rows.append([f"{way} / {other}", *(f"{rates[b][way] / rates[b][other]:.2f} x" for b in rates)])
    peak = matrix_product_peak()
    for way, k in (("a whole forward", 0), ("what structured polls leave", 1)):
        floor = (f"{peak * 1e9 / flops(model, batch_of(data, int(b)))[k]:,.0f}" for b in rates)
        rows.append([f"{way} at {peak:.0f} GFLOP/s", *floor])
    show(console, title, ["way", *(f"batch {b}" for b in rates)], rows)

    size = 32 if 32 in args.batches else args.batches[0]
    classes = measure_classes(model, batch_of(data, size), 0.1 * args.seconds)
    time_share = {name: n / rate for name, (n, rate) in classes.items()}
    rows = [
        [name, f"{n:,}", f"{n / n_weights:.1%}", f"{rate:,.0f}", f"{time_share[name] / sum(time_share.values()):.1%}"]
        for name, (n, rate) in classes.items()
    ]
    columns = ["class of parameter", "weights", "share", "evaluations/s", "share of the time"]
    show(console, f"Structured polls by class, batch {size}", columns, rows)
    draw(rates, args.output, title)
    console.print(f"Figure: {args.output}", soft_wrap=True)
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 256, "weights": n_weights, "tokens": data.max_len}
    print(json.dumps({"threads": args.threads, "model": sizes, "batch": rates}))


def measure_sizes(console: Console, data: StateTrackingDataModule, args: argparse.Namespace) -> None:
    """Structured polls against batched inference over width and depth, at the first batch size."""
    widths, depths = [(d, 2) for d in (16, 32, 64, 128, 256, 512)], [(64, n) for n in (1, 2, 4, 8, 12)]
    grid = [*widths, *(size for size in depths if size not in widths), (128, 4), (256, 6)]  # the last: medium and large
    ways, result, rows = ["batched_inference", "structured"], {}, []
    for d_model, n_layers in grid:
        model, batch = make_model(data, d_model=d_model, n_layers=n_layers), batch_of(data, args.batches[0])
        rates = measure(model, batch, ways, args.seconds / len(grid), args.block or 192)
        result[d_model, n_layers] = rates
        full, left = flops(model, batch)
        ratio = rates["structured"] / rates["batched_inference"]
        weights = sum(p.numel() for p in model.parameters())
        cells = [f"{weights:,}", *(f"{rates[w]:,.0f}" for w in ways), f"{ratio:.1f} x", f"{full / left:.1f} x"]
        rows.append([f"{n_layers} x d{d_model}", *cells])
    columns = ["model", "weights", *ways, "ratio", "of operations"]
    show(console, f"Cost against size, batch {args.batches[0]}, {args.threads} thread(s)", columns, rows)
    for name, sizes, axis in (("width", widths, 0), ("depth", depths, 1)):
        x = [size[axis] for size in sizes]
        exponents = (f"{way} {exponent(x, [result[size][way] for size in sizes]):.2f}" for way in ways)
        console.print(f"Seconds an evaluation grow with the {name} to the power: {', '.join(exponents)}")
    sizes = [{"d_model": d, "n_layers": n, **rates} for (d, n), rates in result.items()]
    print(json.dumps({"threads": args.threads, "batch": args.batches[0], "sizes": sizes}))


def exponent(sizes: list[int], rates: list[float]) -> float:
    """Least-squares slope of log seconds an evaluation against log size."""
    return statistics.linear_regression([math.log(x) for x in sizes], [-math.log(rate) for rate in rates]).slope


if __name__ == "__main__":
    main()
