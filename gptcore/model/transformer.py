"""The Transformer decoder, whole: embedding, blocks of attention and feed-forward, final norm, head.

Legend, for every shape written on its line:
    B  sequences in the batch        D  width of the residual stream     F  inner width of the feed-forward network
    T  tokens of this call           H  query heads                      V  vocabulary
    S  tokens seen so far (cache)    G  key and value heads, H % G == 0  K  size of one head

Weights are float32 (the optimizer's copy); activations have `compute_dtype`, and every product casts its weight to the type
of what flows in. In inference the weights are cast once (`gptcore.model.folder.load_model`).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.config import ModelConfig, RopeScaling
from gptcore.model.cache import Cache, LayerCache
from gptcore.model.layout import Layout, banded


class GPT(nn.Module):
    """Token ids in, logits of the next token out.

    The default settings are the Qwen3 layout (Yang et al. 2025); `preset("gpt2")` is GPT-2 (Radford et al. 2019).
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.compute_dtype = torch.float32
        self.embedding = nn.Embedding(vocab_size, config.width, device=device)
        self.embedding_norm = Norm(config, config.width, device) if config.embedding_norm else None
        self.smear = Linear(config.width, 1, bias=False, device=device) if config.smear else None
        places = config.context + config.position_offset if config.positions == "learned" else 0
        self.positions = nn.Embedding(places, config.width, device=device) if places else None
        self.segments = nn.Embedding(config.segments, config.width, device=device) if config.segments else None
        self.spans = nn.Embedding(config.context + 1, config.width, device=device) if config.objective == "prefix" else None
        # Beside the blocks and not in them: these are tables, which no optimizer may take for matrices.
        tables = config.layers if config.value_embeddings else 0
        self.values = nn.ModuleList(
            nn.Embedding(vocab_size, config.key_value_heads * config.size_of_head, device=device) for _ in range(tables)
        )
        self.blocks = nn.ModuleList(Block(config, device) for _ in range(config.layers))
        self.norm = Norm(config, config.width, device) if config.residual != "post" else None
        self.transform = HeadTransform(config, device) if config.head_transform else None
        self.head = None if config.tied else Linear(config.width, vocab_size, bias=False, device=device)
        self.head_bias = nn.Parameter(torch.zeros(vocab_size, device=device)) if config.head_bias else None

    def forward(self, tokens: Tensor, cache: Cache | None = None, layout: Layout | None = None) -> Tensor:
        """Logits (B, T, V) for tokens (B, T) of int64; with a cache, T new tokens after the S that it holds."""
        return self.logits(self.hidden(tokens, cache, layout))

    def hidden(self, tokens: Tensor, cache: Cache | None = None, layout: Layout | None = None) -> Tensor:
        """What the head reads: the normed residual stream (B, T, D). `layout`: where the tokens stand and what they see."""
        config = self.config
        if layout is None:
            layout = Layout() if cache is None else cache.layout(tokens.shape[1])
        place = layout.places  # (T) or (B, T)
        if place is None:
            place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self._embed(tokens, place, layout.segments)  # (B, T, D)
        if self.smear is not None:
            before = torch.cat((self._embed(_before(tokens, cache), place), x[:, :-1]), 1)  # (B, T, D)
            x = x + self.smear(x).sigmoid() * before * (place > 0).unsqueeze(-1)  # nothing stands before a text
        if self.spans is not None:
            x = x + self.spans(torch.zeros_like(place) if layout.spans is None else layout.spans)
        x = F.dropout(x.to(self.compute_dtype), config.dropout, self.training)
        rotation = None
        if config.positions == "rotary":
            rotation = rotary(place, config.rotary_size, config.rope_theta, config.rope_scaling)
        masks = self._masks(layout.mask, tokens.shape[1], 0 if cache is None else cache.length, tokens.device)
        for index, block in enumerate(self.blocks):
            value = self.values[index](tokens).to(x.dtype) if config.value_embeddings else None  # (B, T, G K)
            x = block(x, rotation, masks[config.window(index)], None if cache is None else cache.layers[index], value)
        if cache is not None:
            cache.tokens[:, cache.length : cache.length + tokens.shape[1]] = tokens
            cache.length += tokens.shape[1]
        if self.norm is not None:
            x = self.norm(x)
        return x if self.transform is None else self.transform(x)

    def cache(self, batch: int, room: int, padding: Tensor | None = None) -> Cache:
        """An empty cache for `batch` texts of up to `room` tokens, `padding` (B) of which are padding on the left."""
        return Cache(self.config, batch, room, padding, self.compute_dtype, self.embedding.weight.device)

    def _embed(self, tokens: Tensor, place: Tensor, segments: Tensor | None = None) -> Tensor:
        """Token ids (B, T) at their places (T) or (B, T) -> their embeddings (B, T, D), normed where the settings say so."""
        x: Tensor = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(place + self.config.position_offset)
        elif self.config.positions == "sinusoidal":
            x = x * math.sqrt(self.config.width) + sinusoids(place, self.config.width)
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(place) if segments is None else segments)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _masks(self, mask: Tensor | None, new: int, before: int, device: torch.device) -> dict[int | None, Tensor | None]:
        """The mask for each window of the settings; they differ once there are more tokens than the window is wide."""
        wide = {window for window in self.config.windows if window is None or window >= before + new}
        narrow = {window for window in self.config.windows if window is not None and window < before + new}
        return {**dict.fromkeys(wide, mask), **{window: banded(mask, new, before, window, device) for window in narrow}}

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: (…, D) -> (…, V)."""
        logits = F.linear(hidden, self.embedding.weight.to(hidden.dtype)) if self.head is None else self.head(hidden)
        return logits if self.head_bias is None else logits + self.head_bias.to(hidden.dtype)

    @property
    def head_weight(self) -> Tensor:
        """The matrix (V, D) that turns the hidden state into logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def initialise(self, seed: int) -> "GPT":
        """Draw all weights anew; equal seeds give equal weights on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.data.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            deviation = self._deviation(name, weight)
            drawn = torch.empty(weight.shape, device="cpu").normal_(0.0, deviation, generator=generator)
            weight.data.copy_(drawn)
        return self

    def _deviation(self, name: str, weight: Tensor) -> float:
        """Standard deviation of a matrix at the start.

        GPT-2's 0.02 and its 1/sqrt(2 layers) on what writes into a residual stream that is never normed; matrices of the modern
        block are scaled with their input width instead, so that one learning rate suits all widths.
        """
        residual = name.endswith(("attention.output.weight", "ffn.down.weight")) and self.config.residual != "post"
        if self.config.norm == "layer":
            return 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
        if name.startswith(("embedding", "positions", "segments", "spans", "head")):
            return 0.02
        if name.startswith(("smear", "values")):
            return 0.0  # a gate that is half open, and tables that say nothing yet
        return (1.0 / math.sqrt(2 * self.config.layers) if residual else 1.0) * 0.5 / math.sqrt(weight.shape[1])


def _before(tokens: Tensor, cache: Cache | None) -> Tensor:
    """The token (B, 1) before tokens (B, T); an arbitrary one where there is none."""
    return tokens[:, :1] if cache is None or cache.length == 0 else cache.tokens[:, cache.length - 1 : cache.length]


class Block(nn.Module):
    """Attention and the feed-forward network, each with a norm, a residual around both; `residual` says in which order."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.dropout, self.residual = config.dropout, config.residual
        self.attention_norm = Norm(config, config.width, device)
        self.attention = Attention(config, device)
        self.ffn_norm = Norm(config, config.width, device)
        self.ffn = SwiGLU(config, device) if config.activation == "swiglu" else FeedForward(config, device)

    def forward(
        self,
        x: Tensor,
        rotation: "Rotation | None" = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). `value` as in `Attention`."""
        if self.residual == "post":
            mixed = self.attention(x, rotation, mask, cache, value)
            x = self.attention_norm(x + F.dropout(mixed, self.dropout, self.training))
            normed: Tensor = self.ffn_norm(x + F.dropout(self.ffn(x), self.dropout, self.training))
            return normed
        mixed = self.attention(self.attention_norm(x), rotation, mask, cache, value)
        mixed = x + F.dropout(mixed, self.dropout, self.training)
        read = x if self.residual == "parallel" else mixed
        return mixed + F.dropout(self.ffn(self.ffn_norm(read)), self.dropout, self.training)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(K) + M) V per head; heads concatenated and projected (Vaswani et al. 2017).

    Groups of H/G query heads share one key and value head (Ainslie et al. 2023).
    """

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.heads, self.groups, self.size = config.heads, config.key_value_heads, config.size_of_head
        self.causal, self.scale = config.objective != "masked", config.attention_scale or 1.0 / math.sqrt(self.size)
        biases = config.biases_of_queries
        self.query = Linear(config.width, self.heads * self.size, bias=biases, device=device)
        self.key = Linear(config.width, self.groups * self.size, bias=biases, device=device)
        self.value = Linear(config.width, self.groups * self.size, bias=biases, device=device)
        self.joint: nn.Module | None = None  # in inference, query, key and value in one product (`gptcore.model.quantisation`)
        self.output = Linear(self.heads * self.size, config.width, bias=config.biases, device=device)
        self.query_norm = Norm(config, self.size, device) if config.qk_norm else None
        self.key_norm = Norm(config, self.size, device) if config.qk_norm else None
        self.attend = Attend()

    def forward(
        self,
        x: Tensor,
        rotation: "Rotation | None" = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). `mask` (B or 1, 1, T, S) of True where a query may look replaces the rule of the model: up to
        its own place, or with the masked objective everywhere. `value` (B, T, G K) is added to the values."""
        batch, length, _ = x.shape
        if self.joint is None:
            q, k, v = self.query(x), self.key(x), self.value(x)
        else:
            q, k, v = self.joint(x).split([count * self.size for count in (self.heads, self.groups, self.groups)], -1)
        q = q.view(batch, length, self.heads, self.size)  # (B, T, H, K)
        k = k.view(batch, length, self.groups, self.size)  # (B, T, G, K)
        v = v if value is None else v + value  # (B, T, G K)
        v = v.view(batch, length, self.groups, self.size).transpose(1, 2)  # (B, G, T, K)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, K), (B, G, T, K)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, S, K)
        out = self.attend(q, k, v, mask, causal=self.causal, scale=self.scale)  # (B, H, T, K)
        projected: Tensor = self.output(out.transpose(1, 2).reshape(batch, length, -1))  # (B, T, D)
        return projected


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = True, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T + M) v: (B, H, T, K), (B, G, S, K), (B, G, S, K) -> (B, H, T, K). `scale` unset: 1 / sqrt(K).

    Without a mask T == S, and it is causal or, where that is not wanted, sees everything; or T == 1 and sees everything.
    """
    if q.shape[2] == 1:
        # The heads of a group become the queries of one: no key or value is copied for each of them.
        rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # (B, G, H/G, K)
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale).reshape(q.shape)
    if q.device.type == "cpu" and mask is None and causal and q.shape[2] <= 512:
        return _attend_plainly(q, k, v, scale or 1.0 / math.sqrt(q.shape[3]))
    grouped, causal = k.shape[1] != q.shape[1], causal and mask is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


class Attend(nn.Module):
    """`attend` as a module, so that a forward hook sees what it is given; `attention_weights` turns that into weights."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **rule: Any) -> Tensor:
        """As `attend`."""
        return attend(q, k, v, mask, **rule)


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None = None, *, causal: bool = True, scale: float | None = None
) -> Tensor:
    """What `attend` multiplies the values with: (B, H, T, K), (B, G, S, K) -> (B, H, T, S), each row sums to 1."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (scale or 1.0 / math.sqrt(q.shape[3])) * (q @ k.transpose(2, 3))  # (B, H, T, S)
    if mask is None and causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The equation as it stands. On CPUs and short contexts faster, forward and backward, than the fused kernel."""
    batch, heads, length, size = q.shape
    if k.shape[1] != heads:
        k = k.repeat_interleave(heads // k.shape[1], dim=1)
        v = v.repeat_interleave(heads // v.shape[1], dim=1)
    q, k, v = (part.reshape(batch * heads, length, size) for part in (q, k, v))
    hidden = torch.full((length, length), -math.inf, dtype=q.dtype, device=q.device).triu(1)  # (T, T)
    scores = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=scale)  # (B H, T, T)
    return torch.bmm(scores.softmax(-1), v).view(batch, heads, length, size)


class FeedForward(nn.Module):
    """W2 phi(W1 x + b1) + b2, without an outer activation; phi is ReLU, GELU (Hendrycks and Gimpel 2016) or its tanh form."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = Linear(config.width, config.inner_width, bias=config.biases_of_ffn, device=device)
        self.down = Linear(config.inner_width, config.width, bias=config.biases_of_ffn, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        down: Tensor = self.down(activate(self.up(x), self.activation))  # (B, T, F) inside
        return down


def activate(x: Tensor, activation: str) -> Tensor:
    """phi of the settings, whatever the shape."""
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class SwiGLU(nn.Module):
    """W2 (silu(W1 x) * W3 x) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.gate = Linear(config.width, config.inner_width, bias=config.biases_of_ffn, device=device)
        self.up = Linear(config.width, config.inner_width, bias=config.biases_of_ffn, device=device)
        self.joint: nn.Module | None = None  # in inference, gate and up in one product
        self.down = Linear(config.inner_width, config.width, bias=config.biases_of_ffn, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        gate, up = (self.gate(x), self.up(x)) if self.joint is None else self.joint(x).chunk(2, -1)  # (B, T, F)
        down: Tensor = self.down(F.silu(gate) * up)
        return down


class HeadTransform(nn.Module):
    """A layer of the width of the stream, its activation and a norm: what BERT has before its head (Devlin et al. 2019)."""

    def __init__(self, config: ModelConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.activation = config.activation
        self.dense = Linear(config.width, config.width, bias=config.biases, device=device)
        self.norm = Norm(config, config.width, device)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, D)."""
        normed: Tensor = self.norm(activate(self.dense(x), self.activation))
        return normed


class Linear(nn.Linear):
    """A linear layer that computes in the type of its input, whatever its weights are stored in."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis."""

    def __init__(self, config: ModelConfig, size: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.epsilon = config.norm_epsilon
        self.weight = nn.Parameter(torch.ones(size, device=device))
        self.bias = nn.Parameter(torch.zeros(size, device=device)) if config.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """(…, size) -> (…, size)."""
        weight = self.weight.to(x.dtype)
        if self.bias is None:
            normed: Tensor = _RMSNorm.apply(x, weight, self.epsilon)  # type: ignore[no-untyped-call]
            return normed
        return F.layer_norm(x, (x.shape[-1],), weight, self.bias.to(x.dtype), self.epsilon)


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) * weight, with the gradient by hand.

    On CPUs `F.rms_norm` is a chain of operations on float32 copies, four times as slow forward; only the sum of squares
    needs float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """(…, size), (size) -> (…, size)."""
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x)).square()
        scale = (squares / x.shape[-1] + epsilon).rsqrt().to(x.dtype)  # (…, 1)
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = x * scale * weight
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """d/dx = scale (g w - x̂ mean(g w x̂)), d/dw = sum of g x̂ over everything but the last axis."""
        x, weight, scale = ctx.saved_tensors
        normed, inner = x * scale, gradient * weight
        mean = (inner * normed).mean(-1, keepdim=True, dtype=_wide(x)).to(x.dtype)
        to_weight = (gradient * normed).flatten(0, -2).sum(0, dtype=_wide(x)).to(weight.dtype)
        return scale * (inner - normed * mean), to_weight, None


def _wide(x: Tensor) -> torch.dtype:
    """The type that sums are taken in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ----------------------------------------------------------------------------------------------------- positions --


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the rotary angles, each (1, T, K) or (B, 1, T, K), where K is as much of a head as they turn."""

    cosine: Tensor
    sine: Tensor


def rotary(place: Tensor, size: int, theta: float, scaling: RopeScaling | None = None) -> Rotation:
    """Angles place * theta^(-2i/K) of rotary positions (Su et al. 2021), both halves of a head alike (Llama's order).

    `scaling`: how the frequencies theta^(-2i/K) are slowed down.
    """
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device=place.device) / size)  # (K/2)
    if scaling is not None:
        frequency = frequency * _slowed(frequency, scaling)
    angle = (place.float().unsqueeze(-1) * frequency).unsqueeze(-3)  # (1, T, K/2) or (B, 1, T, K/2)
    angle = torch.cat((angle, angle), -1)
    return Rotation(angle.cos(), angle.sin())


def _slowed(frequency: Tensor, scaling: RopeScaling) -> Tensor | float:
    """The factors of rotary frequencies (K/2) in a stretched context, between 1 / factor and 1."""
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    if low is None or high is None or original is None:
        return 1.0 / scaling.factor
    turns = original * frequency / (2.0 * math.pi)  # in the context that they were learned in
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept + (1.0 - kept) / scaling.factor


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (i, i + K/2) of (B, H, T, K) by its angle; what a head has beyond K stays as it is."""
    size = rotation.cosine.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], rotation), x[..., size:]), -1)
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat((-right, left), -1)
    return x * rotation.cosine.to(x.dtype) + turned * rotation.sine.to(x.dtype)


def sinusoids(place: Tensor, width: int) -> Tensor:
    """sin(place / 10000^(2i/D)) at 2i and the cosine at 2i + 1 (Vaswani et al. 2017, section 3.5): (…, T) -> (…, T, D)."""
    pair = torch.arange(0, width, 2, dtype=torch.float32, device=place.device)  # (D/2)
    angle = place.float().unsqueeze(-1) * 10_000.0 ** (-pair / width)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)
