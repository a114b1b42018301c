"""Muon for the hidden matrices, AdamW for everything else, as pure functions on trees.

Runs in: trainer. Weights, gradients and state are flat dictionaries of float32 arrays by
parameter name.

Muon's update is orthogonal: all its singular values are near 1. It is scaled by
sqrt(max(1, rows / columns)), Keller Jordan's convention, whose learning rates are near 0.02.
Weight decay is decoupled: weights shrink by (learning rate × decay), the gradient is untouched.
"""

from __future__ import annotations

from collections import defaultdict

import mlx.core as mx

from pipeline.config import Hyperparameters, Optimization

Arrays = dict[str, mx.array]
State = dict[str, Arrays]

# Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/ — coefficients of the
# quintic iteration; they maximise the slope at zero and keep singular values within 0.7 … 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def is_hidden_matrix(name: str, array: mx.array) -> bool:
    """Whether Muon is for this weight: a matrix of a layer, not the embedding or the head."""
    return array.ndim == 2 and name.startswith("layers.")


def orthogonalize(G: mx.array, steps: int) -> mx.array:
    """The nearest (nearly) orthogonal matrices by Newton-Schulz iterations.

    Args:
        G: Stack of matrices of one shape, (n, rows, columns), in the dtype to compute in; the
            norm is taken in float32.
        steps: Iterations.

    Returns:
        The same shape and dtype.
    """
    full = G.astype(mx.float32)
    norm = mx.sqrt((full * full).sum(axis=(-2, -1), keepdims=True)) + 1e-7
    X = (full / norm).astype(G.dtype)
    tall = G.shape[-2] > G.shape[-1]
    for _ in range(steps):  # the products are of the smaller side, so no matrix is transposed
        S = X.swapaxes(-1, -2) @ X if tall else X @ X.swapaxes(-1, -2)
        S = _B * S + _C * (S @ S)
        X = _A * X + (X @ S if tall else S @ X)
    return X


def init(weights: Arrays, config: Optimization) -> State:
    """Empty state: momentum for Muon's weights, two moments for AdamW's, updates counted."""
    muon = _muon_names(weights, config)
    rest = [name for name in weights if name not in muon]
    return {
        "momentum": {name: mx.zeros_like(weights[name]) for name in muon},
        "first": {name: mx.zeros_like(weights[name]) for name in rest},
        "second": {name: mx.zeros_like(weights[name]) for name in rest},
        "count": {"updates": mx.array(0.0)},
    }


def _muon_names(weights: Arrays, config: Optimization) -> set[str]:
    if config.optimizer != "muon":
        return set()
    return {name for name, array in weights.items() if is_hidden_matrix(name, array)}


def global_norm(arrays: Arrays) -> mx.array:
    """Euclidean norm over all arrays together, float32."""
    squares = (mx.square(array.astype(mx.float32)).sum() for array in arrays.values())
    return mx.sqrt(sum(squares, start=mx.array(0.0)))


def apply(
    weights: Arrays,
    gradients: Arrays,
    state: State,
    multiplier: mx.array,
    config: Optimization,
    hyper: Hyperparameters,
    dtype: mx.Dtype,
) -> tuple[Arrays, State]:
    """One update.

    Args:
        weights: float32.
        gradients: Of the same names, already clipped.
        state: From init, or the update before.
        multiplier: Of the schedule: the factor on all learning rates.
        config: Which optimizer, and its constants.
        hyper: Learning rate and weight decay.
        dtype: Of the Newton-Schulz products.

    Returns:
        New weights and state.
    """
    muon = config.optimizer == "muon"
    lr = hyper.learning_rate * multiplier
    adam_lr = (config.adamw_learning_rate if muon else hyper.learning_rate) * multiplier
    new, momentum = _muon(weights, gradients, state["momentum"], lr, config, hyper, dtype)
    count = state["count"]["updates"] + 1
    first, second = {}, {}
    beta1, beta2 = config.betas
    for name, before in state["first"].items():
        g = gradients[name]
        m = first[name] = beta1 * before + (1 - beta1) * g
        v = second[name] = beta2 * state["second"][name] + (1 - beta2) * g * g
        step = (m / (1 - beta1**count)) / (mx.sqrt(v / (1 - beta2**count)) + config.eps)
        decay = hyper.weight_decay if weights[name].ndim > 1 else 0.0
        new[name] = weights[name] * (1 - adam_lr * decay) - adam_lr * step
    return new, {
        "momentum": momentum,
        "first": first,
        "second": second,
        "count": {"updates": count},
    }


def _muon(
    weights: Arrays,
    gradients: Arrays,
    momenta: Arrays,
    lr: mx.array,
    config: Optimization,
    hyper: Hyperparameters,
    dtype: mx.Dtype,
) -> tuple[Arrays, Arrays]:
    """Muon over stacks of matrices of one shape: a few large products instead of many small."""
    stacks: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in momenta:
        stacks[weights[name].shape].append(name)
    new: Arrays = {}
    kept: Arrays = {}
    for (rows, columns), names in stacks.items():
        ahead = []
        for name in names:
            g = gradients[name]
            m = kept[name] = config.momentum * momenta[name] + (1 - config.momentum) * g
            look = config.momentum * m + (1 - config.momentum) * g if config.nesterov else m
            ahead.append(look.astype(dtype))
        orthogonal = orthogonalize(mx.stack(ahead), config.ns_steps)
        scale = max(1.0, rows / columns) ** 0.5
        for index, name in enumerate(names):
            update = orthogonal[index].astype(mx.float32)
            new[name] = weights[name] * (1 - lr * hyper.weight_decay) - lr * scale * update
    return new, kept
