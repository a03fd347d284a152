"""What a model writes when it reads its own outputs, and sequences as people read them, for the data of every task.

Teacher forcing reads the true outputs so far. Both agree up to the first error, so an output is right in one exactly
if it is right in the other: `exact_match`, which comes from one teacher-forced pass, is that of greedy decoding, but
for a text that is written on, where it counts what is given too.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
from torch import nn

from data.sequences import SequenceDataModule, SequenceLoader

VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥"})  # characters that would break a line of a display


@torch.no_grad()
def decode(model: nn.Module, data: SequenceDataModule, prompt: Sequence[int]) -> list[int]:
    """What a model in eval mode writes after a prompt, given as token ids: classes, with that which ended the output.

    Raises:
        ValueError: the sequence is longer than the model can read.
    """
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)  # (1, T)
    longest, output_tokens = data.n_outputs(len(prompt)), data.splits["train"].output_tokens
    if output_tokens is None:  # nothing that is written is read
        return model(tokens)[0, -longest:].argmax(-1).tolist()
    output: list[int] = []
    while len(output) < longest:
        output.append(int(model(tokens)[0, -1].argmax()))
        if output[-1] >= len(output_tokens):  # a class that is never read ends the output
            break
        tokens = torch.cat([tokens, tokens.new_tensor([[output_tokens[output[-1]]]])], 1)
    return output


def predict(model: nn.Module, data: SequenceDataModule, inputs: Sequence[str]) -> list[str]:
    """The outputs of a trained model for inputs of one's own, both in names, with `data.separator` between them.

        task, data, cfg = load_run("runs/2026-11-26_00-33-10-441156")
        predict(task, data, ["0 1 1 0 1 0 0 1"])  # ["1 1 1 0 0 1 0 0"] by a run that has learned parity

    Args:
        model: in eval mode, as `load_run` gives it; the task or its `model`.
        data: its data; `data.tokens` are the names of what is read, `data.classes` of what is written.
        inputs: as in the data; a SEP at the end may be left out.

    Raises:
        ValueError: an empty input, an unknown token, or an input that is longer than the model can read.
    """
    outputs = [decode(model, data, data.prompt(given)) for given in inputs]
    return [data.separator.join(data.classes[c] for c in output) for output in outputs]


def decode_rows(
    model: nn.Module, data: SequenceDataModule, split: str, rows: Sequence[int]
) -> Iterator[dict[str, list[str]]]:
    """The "input", the "output" of a model in eval mode, and the "truth" of some rows of a split, in names."""
    sequences = data.splits[split]
    prompts, written = sequences.prompts(), sequences.written
    for row in rows:
        yield {
            "input": [data.tokens[i] for i in prompts[row]],
            "output": [data.classes[c] for c in decode(model, data, prompts[row])],
            "truth": [data.classes[c] for c in sequences.y[row][written[row]].tolist()],
        }


@torch.no_grad()
def wrong_rows(model: nn.Module, data: SequenceDataModule, split: str) -> list[int]:
    """The rows that a model in eval mode gets wrong, from teacher-forced passes."""
    device = next(model.parameters()).device
    batches = SequenceLoader(data.splits[split], 1000)
    right = torch.cat([model(b["x"].to(device)).argmax(-1).cpu() == b["y"] for b in batches])  # (N, T)
    return (~right & data.splits[split].written).any(1).nonzero().flatten().tolist()


def in_columns(rows: dict[str, list[str]], width: int, separator: str = " ") -> Iterator[str]:
    """Rows of words, each behind its label, as lines of at most `width` characters.

    The words of a column stand below each other. Rows that are too long go on below the others, with their labels.
    """
    margin, used, blocks, gap = max(map(len, rows)) + 1, 0, list[list[list[str]]]([[]]), len(separator)
    for words in zip_longest(*rows.values(), fillvalue=""):
        column = max(map(len, words)) + gap
        if blocks[-1] and margin + used + column - gap > width:
            blocks.append([])
            used = 0
        blocks[-1].append([word.translate(VISIBLE).ljust(column) for word in words])
        used += column
    for block in blocks:
        for label, words in zip(rows, zip(*block, strict=True), strict=True):
            yield f"{label:<{margin}}{''.join(words)}".rstrip()
