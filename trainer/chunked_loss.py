"""The head and its loss in one, some rows at a time: no logits of a whole batch in memory.

Runs in: trainer. The gradient of a cross-entropy needs no cotangent but a factor, so it is made
where the logits are, in the forward pass, and they are dropped: three matrix products in all, as
without chunks, and one softmax where loss and backward pass would make two.

Source: the idea of Liger-Kernel's fused linear cross-entropy.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx

_ROWS = 256  # of one chunk: enough for a matrix product to be efficient


@mx.custom_function
def _with_gradients(
    x_ND: mx.array, W_VD: mx.array, targets_N: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The sum of the losses, and its gradients by x and W."""
    total = mx.array(0.0)
    by_W = mx.zeros(W_VD.shape, mx.float32)
    by_x: list[mx.array] = []
    ids = mx.arange(W_VD.shape[0])
    for at in range(0, x_ND.shape[0], _ROWS):
        x, targets = x_ND[at : at + _ROWS], targets_N[at : at + _ROWS, None]
        if by_x:  # one chunk after the other, or all of their logits would be there at once
            x = mx.depends(x, [by_W, by_x[-1], total])
        logits = (x @ W_VD.T).astype(mx.float32)
        p = mx.softmax(logits, axis=-1)
        norm = logits.max(axis=-1) - mx.log(p.max(axis=-1))  # of the softmax: log Σ exp
        taken = mx.take_along_axis(logits, targets.astype(mx.uint32), axis=-1)[:, 0]
        total = total + (norm - taken).sum()
        by_logits = mx.where(ids == targets, p - 1, p).astype(x.dtype)
        by_x.append(by_logits @ W_VD)
        by_W = by_W + (by_logits.T @ x).astype(mx.float32)
    return total, mx.concatenate(by_x), by_W


@_with_gradients.vjp
def _(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
    x, W, targets = primals
    factor, (_, by_x, by_W) = cotangents[0], outputs
    by_x = (factor * by_x).astype(x.dtype)
    return by_x, (factor * by_W).astype(W.dtype), mx.zeros_like(targets)


def loss_sum(x_BTD: mx.array, W_VD: mx.array, targets_BT: mx.array) -> mx.array:
    """Sum of the cross-entropies of all targets, in nats, float32.

    Args:
        x_BTD: Hidden states behind the last norm.
        W_VD: Of the head, or the embedding.
        targets_BT: Token ids.
    """
    D = x_BTD.shape[-1]
    flat = x_BTD.reshape(-1, D), W_VD, targets_BT.reshape(-1)
    total, _, _ = cast(tuple[mx.array, mx.array, mx.array], _with_gradients(*flat))
    return total
