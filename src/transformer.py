"""A decoder-only transformer: an embedding, a chain of pre-LN blocks, a head.

Written to be read in one sitting, and so that every parameter can change the loss: there is no key
bias (softmax is shift invariant), no embedding row or position that the task never uses, and the
head has only the output classes. A direct search pays one evaluation for every dead parameter.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.did_you_mean import one_of

MAX_LAYERS = 1000
POSITIONS = ("learned", "sinusoidal", "rotary", "none")


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, d_model: int, n_heads: int, dropout: float, rotary: bool):
        super().__init__()
        self.n_heads, self.dropout, self.rotary = n_heads, dropout, rotary
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model, bias=False)  # a bias would add the same to every score of a query
        self.value = nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_model, d_model)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, T, d) -> (B, H, T, d/H)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.split_heads(f(x)) for f in (self.query, self.key, self.value))
        if self.rotary:
            query, key = rotate(query), rotate(key)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(-2))  # (B, H, T, d/H) -> (B, T, d)


class FeedForward(nn.Module):
    """Two linear maps with a ReLU between them."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.inner = nn.Linear(d_model, d_ff)
        self.outer = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.relu(self.inner(x)))


class Block(nn.Module):
    """Attention and feed-forward, each behind its LayerNorm and added to the residual stream."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float, rotary: bool):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, n_heads, dropout, rotary)
        self.ff_norm = nn.LayerNorm(d_model)
        self.ff = FeedForward(d_model, d_ff)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x)))
        return x + self.drop(self.ff(self.ff_norm(x)))


class DecoderOnlyTransformer(nn.Module):
    """Token ids (B, T) -> class logits (B, T, n_classes); position t sees the tokens 0..t only.

    Args:
        vocab_size: input tokens, numbered from 0.
        n_classes: output classes.
        max_len: longest input in tokens.
        d_model: width of the residual stream.
        n_layers: blocks.
        n_heads: attention heads; must divide d_model.
        d_ff: width of the feed-forward layer; 4 * d_model if None.
        positions: "learned" (a table), "sinusoidal" (Vaswani et al. 2017, section 3.5), "rotary"
            (Su et al. 2021, RoFormer) or "none".
        embedding_std: standard deviation of the initial embeddings.
        dropout: on the output of attention weights, attention and feed-forward. A search polls in
            eval mode, where dropout is off.

    Raises:
        ValueError: an impossible size or option; in `forward`, an input that is longer than max_len.
    """

    def __init__(
        self,
        vocab_size: int,
        n_classes: int,
        max_len: int,
        d_model: int = 64,
        n_layers: int = 2,
        n_heads: int = 4,
        d_ff: int | None = None,
        positions: str = "learned",
        dropout: float = 0.0,
        embedding_std: float = 0.5,
    ):
        super().__init__()
        d_ff = 4 * d_model if d_ff is None else d_ff
        sizes = dict(vocab_size=vocab_size, n_classes=n_classes, max_len=max_len, d_model=d_model)
        check_options(sizes | dict(n_layers=n_layers, n_heads=n_heads, d_ff=d_ff), positions, dropout, embedding_std)
        self.max_len, self.positions = max_len, positions
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        if positions == "learned":
            self.position_embedding = nn.Embedding(max_len, d_model)
        elif positions == "sinusoidal":
            self.sinusoids: Tensor
            self.register_buffer("sinusoids", sinusoids(max_len, d_model), persistent=False)
        self.drop = nn.Dropout(dropout)
        rotary = positions == "rotary"
        self.blocks = nn.ModuleList(Block(d_model, n_heads, d_ff, dropout, rotary) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, n_classes)
        self.apply(partial(initialise, embedding_std=embedding_std))

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> the residual stream before the first block (B, T, d)."""
        length = tokens.shape[1]
        if length > self.max_len:
            raise ValueError(f"an input of {length} tokens is longer than model.max_len={self.max_len}")
        x = self.token_embedding(tokens)
        if self.positions == "learned":
            x = x + self.position_embedding.weight[:length]
        elif self.positions == "sinusoidal":
            x = x + self.sinusoids[:length]
        return self.drop(x)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # (B, T, d) -> (B, T, n_classes)


def initialise(module: nn.Module, embedding_std: float) -> None:
    """The one place where weights get their first values, for every optimizer.

    Linear maps are uniform in +-1/sqrt(fan_in) with zero biases. Embeddings are
    N(0, embedding_std^2): with the usual .02 the tokens hardly differ behind the first blocks, and a search of single
    coordinates finds nothing to tell them apart by.
    """
    if isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.in_features)
        nn.init.uniform_(module.weight, -bound, bound)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=embedding_std)


def frequencies(width: int, device: torch.device | None = None) -> Tensor:
    """(width / 2,) angular frequencies 10000^(-2i / width), shared by both fixed encodings."""
    return 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)


def sinusoids(length: int, width: int) -> Tensor:
    """(length, width) sines in the even columns, cosines in the odd ones."""
    angles = torch.arange(length)[:, None] * frequencies(width)  # (T, width/2, rounded up)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[:, :width]


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: turn the pair (x_2i, x_2i+1) of position t by the angle t * frequency_i.

    x is (B, H, T, d/H); scores of rotated queries and keys depend on their distance only.
    """
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies(x.shape[-1], x.device)  # (T, d/2H)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def check_options(sizes: dict[str, int], positions: str, dropout: float, embedding_std: float) -> None:
    """Raise a ValueError that names the key and a fix."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"model.{name}={size} must be at least 1")
    n_layers, d_model, n_heads = (sizes[name] for name in ("n_layers", "d_model", "n_heads"))
    if n_layers > MAX_LAYERS:
        raise ValueError(f"model.n_layers={n_layers} is too many; at most {MAX_LAYERS:,}")
    width, rest = divmod(d_model, n_heads)
    if rest:
        near = next(h for h in range(n_heads, 0, -1) if d_model % h == 0)
        raise ValueError(
            f"model.d_model={d_model} is not divisible by model.n_heads={n_heads}; "
            f"try model.d_model={max(1, round(d_model / n_heads)) * n_heads} or model.n_heads={near}"
        )
    one_of("model.positions", positions, POSITIONS)
    if positions == "rotary" and width % 2:
        raise ValueError(
            f"model.positions=rotary turns pairs, but a head has {width} columns "
            f"(model.d_model={d_model} / model.n_heads={n_heads}); use an even head width"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"model.dropout={dropout} must lie in [0, 1)")
    if not 0 < embedding_std < math.inf:
        raise ValueError(f"model.embedding_std={embedding_std} must be above 0")
