"""One small training run for an experiment: fixed data, a held-out loss, a line in a file.

Runs in: benchmarks. The loop is the trainer's own; the data is in memory, so that contestants
see the same windows in the same order and nothing but the step is measured. Results are kept as
JSON lines by setting: an experiment that was cut off goes on where it stood.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks import corpus
from pipeline import config as configuration
from pipeline import encoding, settings
from pipeline.workers import writer
from trainer import blas

blas.preload()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_unflatten  # noqa: E402

from trainer import model as llama  # noqa: E402
from trainer.loop import Loop  # noqa: E402

_HELD_OUT = 0.08  # share of the documents, the last ones
_POINTS = 8  # looks at the held-out loss in one run


class Size(msgspec.Struct, frozen=True):
    """Model and batch of all runs of one experiment."""

    hidden: int = 96
    layers: int = 4
    context: int = 128
    vocab: int = 1024
    batch: int = 16  # windows per update
    validation: int = 12_288  # held-out tokens


class Setting(msgspec.Struct, frozen=True):
    """What distinguishes one run from the others."""

    overrides: dict[str, Any]
    seed: int
    updates: int


class Result(msgspec.Struct, frozen=True):
    """The held-out loss over a run."""

    setting: Setting
    size: Size
    tokens: list[int]  # trained on at each look
    losses: list[float]  # held-out, nats per token
    seconds: float
    alone: float | None = None  # at the end, every document read alone

    @property
    def final(self) -> float:
        return self.losses[-1]


class Data(msgspec.Struct, frozen=True):
    """Windows of T + 1 tokens; validation comes from documents that training never sees."""

    train: np.ndarray  # (n, T + 1)
    validation: np.ndarray  # (m, T + 1)
    vocab_size: int
    said: str


def load(source: Path | None, size: Size) -> Data:
    """Windows of a token file (llm.c's form, from `tokenize`), of a folder of parquet files, or
    of this Python's own library."""
    T = size.context
    if source is not None and source.is_file():
        tokens = writer.read_tokens(source)
        cut = int(len(tokens) * (1 - _HELD_OUT))
        train, held = _windows(tokens[:cut], T), _windows(tokens[cut:], T)
    else:
        encoder = encoding.load("gpt2", size.vocab)
        texts = [text.encode() for text in corpus.source_documents(source)]
        cut = int(len(texts) * (1 - _HELD_OUT))
        train, held = (_windows(_encode(encoder, part), T) for part in (texts[:cut], texts[cut:]))
    said = f"{len(train):,} training windows of {T} tokens"
    return Data(train, held[: size.validation // T], size.vocab, said)


def _encode(encoder: encoding.Encoder, texts: list[bytes]) -> np.ndarray:
    offsets = np.cumsum([0, *map(len, texts)])
    return encoder.encode_block(np.frombuffer(b"".join(texts), np.uint8), offsets, False)


def _windows(tokens: np.ndarray, T: int) -> np.ndarray:
    view = np.lib.stride_tricks.sliding_window_view(tokens, T + 1)
    return view[::T]


class Trials:
    """Runs settings, or takes their results from the file.

    Args:
        data: Windows.
        size: Of the model.
        results: JSON lines; made if it is not there.
        device: cpu or gpu.
        budget_s: A run that is not done by then is an error: its losses would not be comparable.
        jobs: Runs at a time, each in a process of its own: small models leave a GPU idle.
    """

    def __init__(
        self,
        data: Data,
        size: Size,
        results: Path,
        device: str,
        budget_s: float,
        jobs: int = 1,
    ) -> None:
        self.data, self.size, self.file, self.budget_s = data, size, results, budget_s
        self.device, self.jobs = device, jobs
        gpu = device == "gpu"
        mx.set_default_device(mx.gpu if gpu else mx.cpu)
        if not gpu:
            mx.disable_compile()
        self.dtype = mx.bfloat16 if gpu else mx.float32
        lines = results.read_bytes().splitlines() if results.exists() else []
        known = [msgspec.json.decode(line, type=Result) for line in lines]
        self._known = {self._key(one.setting, one.size): one for one in known}

    @staticmethod
    def _key(setting: Setting, size: Size) -> bytes:
        return msgspec.json.encode((setting, size), order="deterministic")

    def run(self, settings: Sequence[Setting]) -> list[Result]:
        """Train as set, unless the file has the results; in the order of the settings."""
        missing = [one for one in settings if self._key(one, self.size) not in self._known]
        if self.jobs == 1:
            for setting in missing:
                self._keep(self.train(setting))
        elif missing:
            context = multiprocessing.get_context("spawn")  # MLX does not survive a fork
            given = self.data, self.size, self.device, self.budget_s
            with concurrent.futures.ProcessPoolExecutor(self.jobs, context) as pool:
                work = [pool.submit(_one, *given, setting) for setting in missing]
                for done in concurrent.futures.as_completed(work):
                    self._keep(done.result())
        return [self._known[self._key(one, self.size)] for one in settings]

    def _keep(self, one: Result) -> None:
        self._known[self._key(one.setting, one.size)] = one
        with self.file.open("ab") as file:
            file.write(msgspec.json.encode(one) + b"\n")
        values = one.setting.overrides.items()
        said = ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in values)
        print(
            f"{one.final:.4f}  seed {one.setting.seed}, {one.setting.updates} updates, {said}, "
            f"{one.seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    def _config(self, setting: Setting) -> configuration.Config:
        size = self.size
        return settings.load(
            "demo",
            {
                "model.dimensions.hidden_size": size.hidden,
                "model.dimensions.intermediate_size": size.hidden * 8 // 3 // 32 * 32,
                "model.dimensions.num_layers": size.layers,
                "model.attention.num_heads": max(1, size.hidden // 48),
                "model.attention.num_kv_heads": max(1, size.hidden // 96),
                "data.preprocessing.max_context_size": size.context,
                "data.tokenizer.vocab_size": size.vocab,
                "training.hyperparameters.batch_size": size.batch,
                "training.hyperparameters.gradient_accumulation_steps": 1,
                "training.hyperparameters.iters": setting.updates,
                "training.scheduler.warmup_steps": max(1, setting.updates // 8),
                "system.seed": setting.seed,
                **setting.overrides,
            },
        )

    def train(self, setting: Setting) -> Result:
        """One run, to its end."""
        vocab_size = self.data.vocab_size
        loop = Loop(self._config(setting), vocab_size, self.dtype, eot=vocab_size - 1)
        windows = self._shuffled(setting.seed)
        looks = {round(setting.updates * n / _POINTS) for n in range(1, _POINTS + 1)}
        tokens, losses, begin = [], [], time.perf_counter()
        for update in range(1, setting.updates + 1):
            loop.update(
                lambda: [mx.array(next(windows)) for _ in range(self.size.batch)],
                lambda: {"wait_s": 0.0},
            )
            if update in looks:
                loop.metrics(flush=True)
                tokens.append(loop.tokens)
                losses.append(self._held_out(loop, loop.eot))
            if time.perf_counter() - begin > self.budget_s:
                raise SystemExit(f"a run took more than --budget-s {self.budget_s}: {setting}")
        seconds = round(time.perf_counter() - begin, 1)
        alone = self._held_out(loop, self.data.vocab_size - 1)
        return Result(setting, self.size, tokens, losses, seconds, alone)

    def _shuffled(self, seed: int) -> Any:
        """Windows for ever, in another order each epoch."""
        rng = np.random.default_rng(seed)
        while True:
            for index in rng.permutation(len(self.data.train)):
                yield self.data.train[index]

    def _held_out(self, loop: Loop, eot: int | None) -> float:
        """Mean loss per token over the validation windows; with eot, inside documents."""
        loop.model.update(tree_unflatten(list(llama.as_dtype(loop.weights, self.dtype).items())))
        held, B = self.data.validation, self.size.batch
        total = 0.0
        for at in range(0, len(held), B):
            total += float(
                llama.losses(loop.model, mx.array(held[at : at + B]), self.dtype, eot=eot)
                .sum()
                .item()
            )
        return total / (held.shape[0] * (held.shape[1] - 1))


def _one(data: Data, size: Size, device: str, budget_s: float, setting: Setting) -> Result:
    """One run in a process of the pool; its result is kept by the parent."""
    return Trials(data, size, Path(os.devnull), device, budget_s).train(setting)
