"""Llama: pre-norm transformer with rotary positions, grouped queries and a gated MLP.

Runs in: trainer. Shapes: B sequences, T tokens, D hidden, H heads, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map_with_path

from pipeline.config import Model
from pipeline.model_size import shape_of
from trainer import chunked_loss

Cache = list[tuple[mx.array, mx.array] | None]
_INIT_STD = 0.02


class Attention(nn.Module):
    """Causal attention; several query heads share a key-value head."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape_of(config)
        D, bias = config.dimensions.hidden_size, config.misc.attention_bias
        self.q_proj = nn.Linear(D, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(D, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(D, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, D, bias=bias)
        self.rope = nn.RoPE(
            self.head_dim, traditional=config.rope.traditional, base=config.rope.theta
        )

    def __call__(
        self,
        x: mx.array,
        past: tuple[mx.array, mx.array] | None = None,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, self.heads, self.head_dim).transpose(0, 2, 1, 3)
        k = self.k_proj(x).reshape(B, T, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        v = self.v_proj(x).reshape(B, T, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        offset = past[0].shape[2] if past is not None else 0
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        if past is not None:
            k = mx.concatenate([past[0], k], axis=2)
            v = mx.concatenate([past[1], v], axis=2)
        seen = mask if mask is not None else "causal" if T > 1 else None
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5, mask=seen)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, T, -1)), (k, v)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        D, F = config.dimensions.hidden_size, config.dimensions.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=config.misc.mlp_bias)
        self.up_proj = nn.Linear(D, F, bias=config.misc.mlp_bias)
        self.down_proj = nn.Linear(F, D, bias=config.misc.mlp_bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        D, eps = config.dimensions.hidden_size, config.normalization.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(D, eps)
        self.post_attention_layernorm = nn.RMSNorm(D, eps)

    def __call__(
        self,
        x: mx.array,
        past: tuple[mx.array, mx.array] | None = None,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        attended, kept = self.self_attn(self.input_layernorm(x), past, mask)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class Llama(nn.Module):
    """The whole model; parameter names are those of Hugging Face's Llama below `model.`."""

    def __init__(self, config: Model, vocab_size: int) -> None:
        super().__init__()
        D = config.dimensions.hidden_size
        self.embed_tokens = nn.Embedding(vocab_size, D)
        self.layers = [Layer(config) for _ in range(config.dimensions.num_layers)]
        self.norm = nn.RMSNorm(D, config.normalization.rms_norm_eps)
        if not config.misc.tie_word_embeddings:
            self.lm_head = nn.Linear(D, vocab_size, bias=False)

    def __call__(
        self, tokens_BT: mx.array, *, eot: int | None = None, recompute: bool = False
    ) -> mx.array:
        """Logits, shape (B, T, V). Arguments: see hidden."""
        return self.hidden(tokens_BT, eot=eot, recompute=recompute) @ self.head().T

    def hidden(
        self, tokens_BT: mx.array, *, eot: int | None = None, recompute: bool = False
    ) -> mx.array:
        """States behind the last norm, shape (B, T, D).

        Args:
            tokens_BT: Token ids.
            eot: Attention stays inside the documents, each of which begins with this token; None:
                every token sees all before it.
            recompute: Keep no activations inside the layers for the backward pass.
        """
        mask = None if eot is None else document_mask(tokens_BT, eot)
        x = self._embed(tokens_BT)
        for layer in self.layers:
            x = _recomputed(layer, x, mask) if recompute else layer(x, None, mask)[0]
        states: mx.array = self.norm(x)
        return states

    def step(self, tokens_BT: mx.array, cache: Cache) -> tuple[mx.array, Cache]:
        """Logits of tokens that follow the cached ones, and the cache behind them."""
        x = self._embed(tokens_BT)
        kept: Cache = []
        for layer, past in zip(self.layers, cache, strict=True):
            x, keep = layer(x, past)
            kept.append(keep)
        return self.norm(x) @ self.head().T, kept

    def _embed(self, tokens_BT: mx.array) -> mx.array:
        states: mx.array = self.embed_tokens(tokens_BT)
        return states.astype(self.norm.weight.dtype)

    def head(self) -> mx.array:
        """What the states are multiplied with, in the dtype of the layers."""
        head = self.lm_head if "lm_head" in self else self.embed_tokens
        return head.weight.astype(self.norm.weight.dtype)


def document_mask(tokens_BT: mx.array, eot: int) -> mx.array:
    """Which token sees which: those before it in its own document, and itself.

    Args:
        tokens_BT: Shape (B, T); the document that a window begins in counts as its first one.
        eot: The token that every document begins with.

    Returns:
        Shape (B, 1, T, T), bool.
    """
    document = mx.cumsum((tokens_BT == eot).astype(mx.int32), axis=1)
    T = tokens_BT.shape[1]
    causal = mx.tril(mx.ones((T, T), mx.bool_))
    return (causal & (document[:, :, None] == document[:, None, :]))[:, None]


def _recomputed(layer: Layer, x: mx.array, mask: mx.array | None) -> mx.array:
    """The layer's output, of which the backward pass computes the inside again."""

    def inside(parameters: dict[str, Any], x: mx.array) -> mx.array:
        layer.update(parameters)
        return layer(x, None, mask)[0]

    return mx.checkpoint(inside)(layer.trainable_parameters(), x)


def initialize(model: Llama, config: Model) -> None:
    """Draw all weights from mx.random: N(0, 0.02); what writes into the residual stream is
    scaled by 1/sqrt(2 × layers); norms 1, biases 0.

    Source: GPT-2, section 2.3.
    """
    scale = (2 * config.dimensions.num_layers) ** -0.5

    def draw(path: str, array: mx.array) -> mx.array:
        if path.endswith("bias"):
            return mx.zeros_like(array)
        if array.ndim == 1:
            return mx.ones_like(array)
        writes = path.endswith(("o_proj.weight", "down_proj.weight"))
        return mx.random.normal(array.shape) * (_INIT_STD * (scale if writes else 1.0))

    model.update(tree_map_with_path(draw, model.parameters()))


def losses(
    model: Llama,
    rows_BT1: mx.array,
    dtype: mx.Dtype,
    *,
    eot: int | None = None,
    recompute: bool = False,
) -> mx.array:
    """Cross-entropies of all targets, in nats, shape (B, T), float32.

    Args:
        model: With its weights in the dtype to compute in.
        rows_BT1: Windows, shape (B, T + 1): T inputs and their shifted targets.
        dtype: Of the logits; float32 is summed as it is, smaller ones by the fused kernel.
        eot: See Llama.
        recompute: See Llama.
    """
    logits = model(rows_BT1[:, :-1], eot=eot, recompute=recompute)
    if dtype == mx.float32:
        logits = logits.astype(mx.float32)
    return mx.fast.cross_entropy(logits, rows_BT1[:, 1:]).astype(mx.float32)


def loss_sum_chunked(
    model: Llama, rows_BT1: mx.array, *, eot: int | None = None, recompute: bool = False
) -> mx.array:
    """The sum of losses(), with the head computed some rows at a time."""
    x = model.hidden(rows_BT1[:, :-1], eot=eot, recompute=recompute)
    return chunked_loss.loss_sum(x, model.head(), rows_BT1[:, 1:])


def as_dtype(weights: dict[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """The weights in the dtype to compute in, by name.

    The embedding stays float32: the gradient of a frequent token is a sum of thousands of terms,
    which bfloat16 would round after each. The head casts it where it multiplies.
    """
    kept = "embed_tokens.weight"
    return {name: w if name == kept else w.astype(dtype) for name, w in weights.items()}
