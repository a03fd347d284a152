"""Greedy decoding: what a model writes when it reads its own outputs, for the data of every task.

Teacher forcing reads the true outputs so far. Both agree up to the first error, so an output is right in one exactly
if it is right in the other: `exact_match`, which comes from one teacher-forced pass, is that of greedy decoding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.sequences import IGNORE, SequenceDataModule, Sequences

Model = Callable[[Tensor], Tensor]  # token ids (B, T) -> logits (B, T, C), causal


@torch.no_grad()
def greedy_decode(
    model: Model,
    prompts: Sequence[Sequence[int]],
    output_tokens: Sequence[int],
    limits: Sequence[int],
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """Write the most likely class after each prompt until one ends the output, or the output is as long as it may be.

    Args:
        model: token ids (B, T) -> logits (B, T, C), causal.
        prompts: B token sequences, of any lengths.
        output_tokens: the token by which each class is read; the classes beyond them (EOS) end an output.
        limits: B positive numbers: the most classes of each output.
        device: of the model.

    Returns:
        B class sequences, with the class that ended them if one did.
    """
    if not prompts:
        return []
    longest = max(len(prompt) + limit - 1 for prompt, limit in zip(prompts, limits, strict=True))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)  # filled up with a token that causality hides
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    ends = [len(prompt) for prompt in prompts]
    outputs: list[list[int]] = [[] for _ in prompts]
    writing = list(range(len(prompts)))
    while writing:
        logits = model(tokens[writing, : max(ends[row] for row in writing)].to(device))  # (B, T, C)
        last = [ends[row] - 1 for row in writing]
        unfinished = []
        for row, c in zip(writing, logits[range(len(writing)), last].argmax(-1).tolist(), strict=True):
            outputs[row].append(c)
            if c < len(output_tokens) and len(outputs[row]) < limits[row]:
                tokens[row, ends[row]] = output_tokens[c]
                ends[row] += 1
                unfinished.append(row)
        writing = unfinished
    return outputs


@torch.no_grad()
def label(
    model: Model, inputs: Sequence[Sequence[int]], counts: Sequence[int], device: torch.device | str = "cpu"
) -> list[list[int]]:
    """The most likely classes at the last positions of inputs that are given as a whole.

    Args:
        model: token ids (B, T) -> logits (B, T, C), causal.
        inputs: B token sequences, of any lengths.
        counts: how many of the last positions of each have a class.
        device: of the model.

    Returns:
        B class sequences.
    """
    tokens = torch.zeros(len(inputs), max(map(len, inputs), default=0), dtype=torch.long)
    for row, given in enumerate(inputs):
        tokens[row, : len(given)] = torch.tensor(given)
    classes = model(tokens.to(device)).argmax(-1).tolist() if inputs else []
    return [of_row[len(given) - n : len(given)] for of_row, given, n in zip(classes, inputs, counts, strict=True)]


def decode(model: nn.Module, data: SequenceDataModule, inputs: Sequence[Sequence[int]]) -> list[list[int]]:
    """The outputs of a task for its inputs, as class sequences; an output ends where the task says.

    Args:
        model: in eval mode.
        data: of the task.
        inputs: what is read before anything is written, as token ids.

    Raises:
        ValueError: an input is longer than the model can read, or the task does not say how long its output is.
    """
    device = next(model.parameters()).device
    counts = [data.n_outputs(len(given)) for given in inputs]
    output_tokens = data.splits["train"].output_tokens
    if output_tokens is None:
        return label(model, inputs, counts, device)
    return greedy_decode(model, inputs, output_tokens, counts, device)


def predict(model: nn.Module, data: SequenceDataModule, inputs: Sequence[str]) -> list[str]:
    """The outputs of a trained model for inputs of one's own, both in names, with spaces between them.

        task, data, cfg = load_run("runs/2026-11-26_00-33-10-441156")
        predict(task, data, ["0 1 1 0 1 0 0 1"])  # ["1 1 1 0 0 1 0 0"] by a run that has learned parity

    Args:
        model: in eval mode, as `load_run` gives it; the task or its `model`.
        data: its data; `data.tokens` are the names of what is read, `data.classes` of what is written.
        inputs: as in the data; a separator with which all of them end may be left out.

    Raises:
        ValueError: an unknown token, or an input that is longer than the model can read.
    """
    outputs = decode(model, data, [data.prompt(given) for given in inputs])
    return [" ".join(data.classes[c] for c in output) for output in outputs]


@dataclass(frozen=True)
class Prediction:
    """One sequence of a split, in the names of its tokens and classes."""

    input: list[str]
    output: list[str]  # what the model writes
    truth: list[str]

    @property
    def right(self) -> bool:
        return self.output == self.truth


def decode_rows(model: nn.Module, data: SequenceDataModule, split: str, rows: Sequence[int]) -> list[Prediction]:
    """What a model in eval mode writes for some rows of a split, beside what is right."""
    sequences = data.splits[split]
    ends = sequences.prompt_lengths.tolist()
    inputs = [sequences.x[row, : ends[row]].tolist() for row in rows]
    return [
        Prediction(
            [data.tokens[i] for i in given],
            [data.classes[c] for c in output],
            [data.classes[c] for c in sequences.y[row].tolist() if c != IGNORE],
        )
        for row, given, output in zip(rows, inputs, decode(model, data, inputs), strict=True)
    ]


@torch.no_grad()
def wrong_rows(model: nn.Module, sequences: Sequences, batch_size: int = 1000) -> list[int]:
    """The rows that a model in eval mode gets wrong, from teacher-forced passes."""
    device = next(model.parameters()).device
    wrong: list[int] = []
    for start in range(0, len(sequences), batch_size):
        x, y = (part[start : start + batch_size] for part in (sequences.x, sequences.y))
        errors = (model(x.to(device)).argmax(-1).cpu() != y) & (y != IGNORE)  # (B, T)
        wrong += (start + errors.any(1).nonzero().flatten()).tolist()
    return wrong
