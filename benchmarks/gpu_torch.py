"""The same model and update in PyTorch: torch.compile, bfloat16, its fused attention, Muon.

    python -m benchmarks.gpu_torch ROWS.npy MICRO_BATCH…      one JSON line each

Used by benchmarks/gpu.py, in a process of its own. float32 master weights, bfloat16 autocast,
64 sequences per update, gradients accumulated in float32: what the MLX trainer does.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import numpy as np
import torch
from torch import nn

V, D, LAYERS, FFN, HEADS, KV, HEAD_DIM, T = 32000, 1024, 12, 2816, 16, 8, 64, 2048
SEQUENCES = 64


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(D, 1e-5), nn.RMSNorm(D, 1e-5)
        self.q, self.o = nn.Linear(D, HEADS * HEAD_DIM, False), nn.Linear(D, D, False)
        self.k, self.v = nn.Linear(D, KV * HEAD_DIM, False), nn.Linear(D, KV * HEAD_DIM, False)
        self.gate, self.up = nn.Linear(D, FFN, False), nn.Linear(D, FFN, False)
        self.down = nn.Linear(FFN, D, False)

    def forward(self, x, cos, sin):
        B, n, _ = x.shape
        h = self.n1(x)
        q = rotate(self.q(h).view(B, n, HEADS, HEAD_DIM).transpose(1, 2), cos, sin)
        k = rotate(self.k(h).view(B, n, KV, HEAD_DIM).transpose(1, 2), cos, sin)
        v = self.v(h).view(B, n, KV, HEAD_DIM).transpose(1, 2)
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(B, n, -1))
        h = self.n2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(D, 1e-5)
        angle = torch.outer(torch.arange(T), 1e4 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, rows):
        x = self.embed(rows[:, :-1]).bfloat16()
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.norm(x) @ self.embed.weight.bfloat16().T
        return nn.functional.cross_entropy(
            logits.view(-1, V).float(), rows[:, 1:].reshape(-1), reduction="sum"
        )


@torch.compile
def newton_schulz(G):
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    X = (X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        S = X @ X.mT
        X = 3.4445 * X + (-4.7750 * S + 2.0315 * (S @ S)) @ X
    return X.mT.float() if G.shape[-2] > G.shape[-1] else X.float()


@torch.no_grad()
def muon(groups, momenta, lr=0.02, beta=0.95):
    for key, params in groups.items():
        G = torch.stack([p.grad for p in params])
        m = momenta.setdefault(key, torch.zeros_like(G))
        m.lerp_(G, 1 - beta)
        update = newton_schulz(G.lerp(m, beta)) * max(1, key[0] / key[1]) ** 0.5
        torch._foreach_mul_(params, 1 - lr * 0.01)
        torch._foreach_add_(params, list(update), alpha=-lr)


def run(rows, micro_batch, updates=12):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Llama().cuda()
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("layers")]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and n.startswith("layers"))]
    groups, momenta = {}, {}
    for p in hidden:
        groups.setdefault(tuple(p.shape), []).append(p)
    adam = torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    compiled = torch.compile(model)
    batch = torch.from_numpy(rows[:micro_batch]).cuda()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(updates + 3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(SEQUENCES // micro_batch):
            with torch.autocast("cuda", torch.bfloat16):
                loss = compiled(batch) / (SEQUENCES * T)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        muon(groups, momenta)
        adam.step()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if number >= 3:
            seconds.append(time.perf_counter() - begin)
    return {
        "micro_batch": micro_batch,
        "tokens_per_s": SEQUENCES * T / statistics.median(seconds),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "loss": loss.item() * SEQUENCES / micro_batch,
        "torch": torch.__version__,
    }


def main():
    torch.set_float32_matmul_precision("high")
    rows = np.load(sys.argv[1])
    for micro_batch in map(int, sys.argv[2:]):
        try:
            print(json.dumps(run(rows, micro_batch)), flush=True)
        except torch.cuda.OutOfMemoryError:
            print(f"micro-batch {micro_batch}: out of memory", file=sys.stderr)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
