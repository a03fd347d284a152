"""How much is computed at a time: on a CPU what its caches hold, on a GPU what keeps it busy.

Sizes are fixed for a kind of device, whatever memory or cores it has: results depend on them in the last digits.
"""

from typing import NamedTuple

import torch


class Sizes(NamedTuple):
    """What goes through the model at a time. Tokens are those of all candidates.

    Attributes:
        rows: tokens of the incumbent, so that a chunk of candidates never holds more.
        part: tokens x weights of the blocks: about what it costs to call the operators for more rows.
        chunk: tokens of candidates that take the whole way through the model.
        chunk_work: the same, times the square of the model's width.
        perturbed: tokens of candidates that move all weights.
        trial: tokens of the candidates of a trial, times weights.
        stacked: weights of candidates that move all weights.
        vmapped: tokens of candidates that `vmap` evaluates: enough to share the prefix and its own cost.
        vmapped_weights: of their stacked tensors.
        block: tokens of candidates per call that keep the chunks of most groups of weights full.
        block_most: candidates per call at the most.
        cache: bytes that may be remembered of the incumbent; rows beyond are computed anew in every call.
    """

    rows: int
    part: int
    chunk: int
    chunk_work: int
    perturbed: int
    trial: int
    stacked: int
    vmapped: int
    vmapped_weights: int
    block: int
    block_most: int
    cache: int

    def candidates_per_call(self, tokens: int) -> int:
        """How many candidates of a batch with so many tokens keep the chunks full."""
        return max(16, min(self.block_most, self.block // max(1, tokens)))


CPU = Sizes(
    rows=2**12,
    part=2**20,  # measured
    chunk=2**14,
    chunk_work=2**26,
    perturbed=2**13,
    trial=2**28,  # smaller parts cost more than a thread gains
    stacked=2**24,
    vmapped=12_800,
    vmapped_weights=2**22,  # 16 MiB in float32
    block=2**19,
    block_most=2**10,
    cache=2**28,
)
GPU = Sizes(
    rows=2**16,
    part=2**40,  # rows are never parted: parts multiply the kernels that are launched
    chunk=2**19,
    chunk_work=2**33,
    perturbed=2**19,
    trial=2**40,
    stacked=2**28,
    vmapped=2**19,
    vmapped_weights=2**28,
    block=2**24,
    block_most=2**14,
    cache=2**33,
)


def sizes_on(device: torch.device) -> Sizes:
    """The sizes for a kind of device."""
    return CPU if device.type == "cpu" else GPU
