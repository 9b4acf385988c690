"""The shape of the model."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gptcore.config.section import Count, Later, Positive, Section, Share


class RopeScaling(Section):
    """Rotary positions stretched to a longer context than they were learned in, named as `config.json` of Llama does."""

    rope_type: Literal["linear", "llama3"]
    """`linear`: all frequencies are divided by the factor (Chen et al. 2023). `llama3`: slow ones are, fast ones are kept, and
    those between are in between (Llama 3.1, `apply_scaling` of meta-llama/llama-models)."""
    factor: Positive
    """How many times longer the context is."""
    low_freq_factor: Positive | None = None
    """With `llama3`: slow is what turns fewer times than this in the original context."""
    high_freq_factor: Positive | None = None
    """With `llama3`: fast is what turns more often than this in the original context."""
    original_max_position_embeddings: Count | None = None
    """With `llama3`: the original context, in tokens."""

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        wrong = [name for name in names if (getattr(self, name) is None) == (self.rope_type == "llama3")]
        if wrong:
            what = "needs" if self.rope_type == "llama3" else "knows no"
            raise ValueError(f"rope_scaling of type {self.rope_type} {what} {', '.join(wrong)}")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor ({self.low_freq_factor}) is to be less than high_freq_factor ({self.high_freq_factor}): "
                "slow turns are fewer than fast ones"
            )
        return self


class ModelConfig(Section):
    """The Transformer decoder. The default is the modern block in the Qwen3 layout; `preset("gpt2")` is the GPT-2 block."""

    layers: Count = 6
    """Blocks."""
    width: Count = 384
    """Size of the residual stream."""
    heads: Count = 6
    """Attention heads."""
    kv_heads: Count | None = None
    """Key and value heads, shared by groups of query heads (Ainslie et al. 2023). Unset: as many as heads."""
    head_size: Count | None = None
    """Size of one head. Unset: width / heads."""
    ffn_width: Count | None = None
    """Inner width of the feed-forward network. Unset: 4 x width, for SwiGLU 8/3 x width rounded up to 64."""
    context: Count = 256
    """Tokens the model sees at once."""
    objective: Literal["causal", "masked", "prefix"] = "causal"
    """What it learns to predict, and so what a token may see. `causal`: the next token, from those before it. `masked`: hidden
    tokens, from all around them (Devlin et al. 2019). `prefix`: hidden spans, one token after the other, from the text around
    them, which sees all of itself (Du et al. 2022)."""
    document_mask: bool = False
    """A token sees only its own document, and positions begin anew with each; unset, a text is read as one stream."""
    windows: tuple[Count | None, ...] = (None,)
    """Tokens that a block sees, back from each and that one included. Blocks take turns: `[null, 256]` is one that sees all and
    one that sees 256 (Child et al. 2019). With the causal objective."""
    residual: Literal["pre", "post", "parallel"] = "pre"
    """Where the norms stand. `pre`: before attention, before the feed-forward network and after the last block (Radford et al.
    2019). `post`: after each sum (Vaswani et al. 2017). `parallel`: as `pre`, but both read the same stream and are added at
    once (Black et al. 2022)."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm."""
    norm_epsilon: Positive = 1e-6
    """Added to the variance inside the norm."""
    positions: Literal["rotary", "learned", "sinusoidal"] = "rotary"
    """How a token knows its place."""
    position_offset: Annotated[int, Field(ge=0)] = 0
    """Rows of the table of learned positions before that of the first place (RoBERTa: 2)."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: Annotated[RopeScaling | None, Later] = None
    """How the rotary frequencies were changed for a longer context. Unset: they are as learned."""
    rotary_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a head, its first part, that rotary positions turn."""
    activation: Literal["swiglu", "gelu", "gelu_tanh", "relu"] = "swiglu"
    """Of the feed-forward network. `gelu_tanh` is the approximation of GPT-1 to GPT-3, `gelu` the function itself."""
    qk_norm: bool = True
    """Normalise queries and keys per head (Henry et al. 2020)."""
    attention_scale: Positive | None = None
    """Factor of the scores of attention. Unset: 1 / sqrt(size of a head)."""
    biases: bool = False
    """Bias vectors in linear layers."""
    qkv_biases: bool | None = None
    """Bias vectors of queries, keys and values. Unset: as `biases`."""
    ffn_biases: Annotated[bool | None, Later] = None
    """Bias vectors of the feed-forward network. Unset: as `biases`."""
    tied: bool = True
    """The head that predicts shares its matrix with the token embedding."""
    head_transform: bool = False
    """One more layer, its activation and a norm before the head (Devlin et al. 2019)."""
    head_bias: bool = False
    """A bias for every logit."""
    segments: Annotated[int, Field(ge=0)] = 0
    """Parts of a text that an embedding of their own tells apart (BERT: 2); whatever is trained here is of the first."""
    embedding_norm: bool = False
    """A norm between the embedding and the first block (Devlin et al. 2019; Le Scao et al. 2022): a small embedding would drown
    in what the blocks add. Not a part of the Qwen3 layout."""
    value_embeddings: bool = False
    """A table per block, whose row of a token is added to what attention reads of it (modded-nanogpt, 2024):
    weights that cost no products. Not a part of the Qwen3 layout."""
    smear: bool = False
    """Add the embedding of the token before, times a gate that reads the token's own (modded-nanogpt, 2025). With rotary
    positions. Not a part of the Qwen3 layout."""
    dropout: Share = 0.0
    """Share of activations dropped while training (embeddings and residual branches)."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        problems = []
        if self.head_size is None and self.width % self.heads:
            problems.append(f"heads ({self.heads}) do not divide width ({self.width}); change one or set head_size")
        if self.heads % self.key_value_heads:
            problems.append(f"kv_heads ({self.kv_heads}) do not divide heads ({self.heads})")
        if self.positions == "rotary" and not problems and self.rotary_size % 2:
            problems.append(f"rotary positions turn pairs, but of a head they are to turn {self.rotary_size}: an odd number")
        if self.positions == "sinusoidal" and self.width % 2:
            problems.append(f"sinusoidal positions need an even width, this one is {self.width}")
        if self.smear and self.positions != "rotary":
            problems.append("smear needs rotary positions: added ones would be smeared too")
        if not self.windows:
            problems.append("windows is empty: give one for every block that takes a turn, or leave it out")
        if any(self.windows) and self.objective != "causal":
            problems.append(f"windows look back only, the objective {self.objective} does not: leave one of them out")
        if self.objective == "prefix" and self.context < 8:
            problems.append(
                f"the prefix objective needs a context of 8 or more for a text and its span, this one is {self.context}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def key_value_heads(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def size_of_head(self) -> int:
        """Size of one attention head."""
        return self.head_size or self.width // self.heads

    @property
    def rotary_size(self) -> int:
        """How much of a head rotary positions turn."""
        return int(self.size_of_head * self.rotary_share)

    @property
    def biases_of_queries(self) -> bool:
        """Whether queries, keys and values have bias vectors."""
        return self.biases if self.qkv_biases is None else self.qkv_biases

    @property
    def biases_of_ffn(self) -> bool:
        """Whether the feed-forward network has bias vectors."""
        return self.biases if self.ffn_biases is None else self.ffn_biases

    def window(self, block: int) -> int | None:
        """Tokens that the block of this number sees; None for all."""
        return self.windows[block % len(self.windows)]

    @property
    def row_context(self) -> int:
        """Most tokens of a task's row; with the prefix objective two more hide and begin its answer."""
        return self.context - 2 if self.objective == "prefix" else self.context

    @property
    def inner_width(self) -> int:
        """Inner width of the feed-forward network."""
        if self.ffn_width is not None:
            return self.ffn_width
        return -(-self.width * 8 // 3 // 64) * 64 if self.activation == "swiglu" else 4 * self.width
