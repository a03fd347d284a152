"""What SCAN measures, and greedy decoding.

The metric is `exact_match`: the whole sequence of actions with EOS. It comes from one teacher-forced
pass and still equals that of greedy decoding, since both read the same tokens up to the first error.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.sequences import IGNORE
from pattern_search_task import PatternSearchTask, Scores


@torch.no_grad()
def greedy_decode(
    model: Callable[[Tensor], Tensor], prompts: Sequence[Sequence[int]], output_tokens: Sequence[int], max_len: int
) -> list[list[int]]:
    """Write the most likely class after each prompt until it is one that ends the output.

    Args:
        model: token ids (B, T) -> logits (B, T, C), causal.
        prompts: B token sequences, of any lengths up to max_len.
        output_tokens: the token by which each class is read; the classes beyond them (EOS) end an output.
        max_len: longest input of the model, in tokens; an output ends there at the latest.

    Returns:
        B class sequences, with the class that ended them if one did.
    """
    tokens = torch.zeros(len(prompts), max_len, dtype=torch.long)  # filled up with a token that causality hides
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    ends = [len(prompt) for prompt in prompts]
    outputs: list[list[int]] = [[] for _ in prompts]
    writing = list(range(len(prompts)))
    while writing:
        logits = model(tokens[writing, : max(ends[row] for row in writing)])  # (B, T, C)
        last = [ends[row] - 1 for row in writing]
        for row, c in zip(writing, logits[range(len(writing)), last].argmax(-1).tolist(), strict=True):
            outputs[row].append(c)
            if c < len(output_tokens) and ends[row] < max_len:
                tokens[row, ends[row]] = output_tokens[c]
                ends[row] += 1
            else:
                ends[row] = 0  # done
        writing = [row for row in writing if ends[row]]
    return outputs


class ScanScores(Scores):
    """Adds `prefix_accuracy`: the share of an output before its first error, which is what a decoder gets right.

    Token accuracy misleads here: the gold actions so far give most of the next ones away.
    """

    def measure(self, logits: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        scored = y != IGNORE
        right = (logits.argmax(-1) == y) | ~scored
        prefix = (right.cumprod(1).bool() & scored).sum(1) / scored.sum(1)  # (B,)
        return super().measure(logits, y) | {"prefix_accuracy": (prefix, torch.ones(len(y)))}


class ScanTask(PatternSearchTask):
    scores_class = ScanScores
