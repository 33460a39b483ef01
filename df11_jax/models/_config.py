"""The configuration of a transformer: its sizes, and where the families differ."""

import dataclasses
from typing import Any

import jax.numpy as jnp

ROPE_KINDS = "default", "linear", "llama3", "yarn", "longrope", "proportional"
_ACTIVATIONS = "silu", "gelu_tanh"


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts, each of them an MLP.

    Attributes:
        count: number of experts; 0 if there is no mixture, but a single MLP.
        per_token: number of experts that each token chooses.
        normed: the probabilities of the experts that a token chooses are divided by their sum.
        shared_hidden: size of activations within the expert that all tokens have beside those that
            they choose; 0 if there is none.
    """

    count: int = 0
    per_token: int = 0
    normed: bool = False
    shared_hidden: int = 0


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies of a rotary position embedding.

    Attributes:
        theta: the base; pair i of n turns by theta^(-i / n) a position.
        kind: "default"; "linear", all frequencies divided by `factor`; "llama3", low ones divided
            by `factor`, high ones unchanged, those between interpolated; "yarn", the same but
            interpolated by the indices of the pairs; "longrope", each divided by its own factor; or
            "proportional", of which only the first `fraction` of the pairs turn, as in "linear".
        factor: the divisor for "linear", "llama3", "yarn" and "proportional".
        low_freq_factor: the limit of low frequencies for "llama3" and "yarn": those that make fewer
            turns in `original_length` positions.
        high_freq_factor: the limit of high frequencies for "llama3" and "yarn": those that make
            more turns in `original_length` positions.
        original_length: the number of positions in which turns are counted, for "llama3" and
            "yarn"; for "longrope", the longest cache with which `short_factors` are used.
        short_factors, long_factors: the divisors for "longrope", one for each pair.
        attention_factor: queries and keys are multiplied by it when they are rotated.
        fraction: the fraction of each head that is rotated, its first elements; for "proportional",
            the fraction of the pairs that turn, which are pairs of the whole head.
        interleaved: pairs are neighbours, and not an element of the first half and one of the
            second.
        query_growth: queries are multiplied by 1 + query_growth ln(1 + n) at positions that
            come after n times `original_length`.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    fraction: float = 1.0
    interleaved: bool = False
    query_growth: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for a kind that would be taken for "default"."""
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"kind is {self.kind!r}, expected one of {', '.join(ROPE_KINDS)}")


@dataclasses.dataclass(frozen=True)
class DeltaRule:
    """The layers with a recurrent state in place of keys and values, by the gated delta rule.

    Attributes:
        layers: a flag for each layer, whether it is one of these.
        key_heads: number of query and of key heads; consecutive value heads share one.
        value_heads: number of value heads, each of which has a state [key_dim, value_dim].
        key_dim: size of a query or key head.
        value_dim: size of a value head.
        taps: number of tokens that the convolution before the rule looks at, its own included.
    """

    layers: tuple[bool, ...]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def channels(self) -> int:
        """Number of channels of the convolution: those of queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclasses.dataclass(frozen=True)
class FullAttention:
    """What is different in full layers, where they have heads of their own.

    Attributes:
        head_dim, kv_heads, keys_are_values: see `Config`.
    """

    head_dim: int
    kv_heads: int
    keys_are_values: bool


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """Embeddings of tokens for each layer, beside those that the first layer gets.

    Attributes:
        vocab: number of tokens that have them.
        dim: size of the embedding of a token for a layer.
    """

    vocab: int
    dim: int


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a transformer.

    Where layers of several types differ, `_layer_types.type_config` tells those of one type.

    Attributes:
        family: `model_type`, as Hugging Face calls it.
        vocab: number of tokens.
        dim: size of activations between blocks.
        hidden: size of activations within the MLP, or within each expert.
        layers: number of blocks.
        heads: number of query heads.
        kv_heads: number of key-value heads; consecutive query heads share one.
        head_dim: size of a head.
        max_length: the longest sequence that it was trained for.
        rope: frequencies in full layers, which attend to all positions before.
        local_rope: frequencies in sliding layers.
        sliding: a flag for each layer, whether it attends to the last `window` positions only.
        window: the number of positions that sliding layers attend to; 0 if there are none.
        qkv_bias: queries, keys and values have biases.
        output_bias: the projection after attention has biases.
        mlp_bias: the MLP has biases.
        qk_norm: queries and keys are normed, head by head.
        post_norms: the outputs of attention and MLP are normed, as well as their inputs.
        unit_offset: norms multiply by 1 + scale.
        activation: the activation of the gate, "silu" or "gelu_tanh".
        norm_eps: the epsilon of all norms.
        embedding_scale: embeddings are multiplied by it.
        attention_scale: scores are multiplied by it.
        attention_softcap: the c of c tanh(x / c), which caps scores; None for no cap.
        logit_softcap: the same for logits.
        tied: the output head is the embedding.
        experts: the experts that take the place of the MLP, if there are some.
        dtype: the dtype of activations and of the key-value cache; weights are cast to it.
        exact: products of compressed weights are those of plain ones, bit for bit: a block is
            decompressed first. Otherwise a GPU may fuse the two; see `df11_jax.dot`.
        axis: the axis of a mesh of devices, if this is the shard that each of them computes in one
            program for all; None otherwise.
        stages: the number of stages, of which this is one if there is more than one.
        output_gate: the outputs of attention are multiplied by the sigmoid of gates, which are
            projected together with the queries.
        value_norm: values are normed, without a scale.
        keys_are_values: values are the keys before these are normed and rotated.
        layer_scalar: each layer's output is multiplied by a number that belongs to the weights.
        delta_rule: the layers with a recurrent state; None if there are none.
        full: what is different in full layers; None if nothing is.
        shared_layers: the number of layers, the last ones, that have no keys and values, but attend
            to those of the last layer before them with the same window.
        shared_hidden: size of activations within the MLP of these.
        shares_keys: the configuration is that of such layers.
        per_layer: embeddings for each layer; None if there are none.
    """

    family: str
    vocab: int
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    rope: Rope
    local_rope: Rope
    sliding: tuple[bool, ...]
    window: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    post_norms: bool
    unit_offset: bool
    activation: str
    norm_eps: float
    embedding_scale: float
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    tied: bool
    experts: Experts = Experts()
    dtype: Any = jnp.bfloat16
    exact: bool = False
    axis: str | None = None
    stages: int = 1
    output_gate: bool = False
    value_norm: bool = False
    keys_are_values: bool = False
    layer_scalar: bool = False
    delta_rule: DeltaRule | None = None
    full: FullAttention | None = None
    shared_layers: int = 0
    shared_hidden: int = 0
    shares_keys: bool = False
    per_layer: PerLayer | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an activation that would be taken for another one."""
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation is {self.activation!r}, expected one of {', '.join(_ACTIVATIONS)}"
            )

    @property
    def layers_differ(self) -> bool:
        """Whether layers have different parameters, so that those of each type are a stack."""
        return bool(self.delta_rule or self.full or self.shared_layers)

    @property
    def is_divided(self) -> bool:
        """Whether this is the shard that each of several devices computes."""
        return self.axis is not None

    @property
    def may_fuse(self) -> bool:
        """Whether products with compressed weights may be fused, where `df11_jax.dot` can."""
        return not self.exact and self.dtype == jnp.bfloat16
