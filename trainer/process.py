"""Process: trainer. Windows of the ring in, a trained model out.

It takes windows, updates, reports, checkpoints; all files but the checkpoints are the
supervisor's to write.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import encoding
from pipeline.channel import Channel
from pipeline.child import Descriptors
from pipeline.config import Config, from_plain
from pipeline.faults import faultpoint
from pipeline.messages import (
    CheckpointWritten,
    ConsumerDone,
    ConsumerReady,
    StepDone,
    TrainerSetup,
)
from shm import ring, segment
from trainer import blas
from trainer.feed import Feed, StopWanted

# Dense bfloat16 FLOP/s of chips whose maker publishes them; MFU is reported for these alone.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


def main(channel: Channel, descriptors: Descriptors) -> None:
    """Train until the configured number of updates, the end of the stream, or Stop."""
    setup = channel.receive()
    assert isinstance(setup, TrainerSetup)
    blas.reproducible()
    library = blas.preload()
    _Training(channel, setup, descriptors, library).run()


class _Training:
    """One trainer's life.

    Args:
        channel: To the supervisor.
        setup: First message.
        descriptors: Of the ring.
        library: The BLAS that was loaded.
    """

    def __init__(
        self, channel: Channel, setup: TrainerSetup, descriptors: Descriptors, library: str
    ) -> None:
        import mlx.core as mx  # only now: the BLAS has to be there first

        from trainer import checkpoint
        from trainer.loop import Loop

        self.mx, self.checkpoint = mx, checkpoint
        self.channel, self.started = channel, time.perf_counter()
        self.config: Config = from_plain(setup.config)
        self.run_dir = Path(setup.run_dir)
        self.gpu = self._choose_device()
        tokenizer = self.config.data.tokenizer
        self.encoder = encoding.load(tokenizer.name, tokenizer.vocab_size)
        wanted = self.config.system.compute_dtype
        half = wanted == "bfloat16" or (wanted == "auto" and self.gpu)
        self.loop = Loop(self.config, self.encoder.vocab_size, mx.bfloat16 if half else mx.float32)
        checkpoint.clean(self.run_dir)
        if setup.checkpoint is not None:
            checkpoint.restore(self.loop, Path(setup.checkpoint))
        memory = segment.attach(descriptors.ring, ring.size_bytes(setup.ring), writable=False)
        T = self.config.data.preprocessing.max_context_size
        self.feed = Feed(channel, ring.Ring(memory, setup.ring), setup.positions, T)
        self.committed = list(setup.positions)  # consumed by whole updates
        self.saved_step = self.loop.step if setup.checkpoint is not None else -1
        self.flops = self._flops_per_token(T)
        self.peak_flops = PEAK_FLOPS.get(self._device_name())
        self.channel.send(
            ConsumerReady(checkpoint.largest_bytes(self.loop), self._facts(library, half))
        )

    # ── what it runs on ─────────────────────────────────────────────────────────────────────

    def _choose_device(self) -> bool:
        """Set MLX's default device; whether it is a GPU."""
        mx, wanted = self.mx, self.config.system.device
        gpu = mx.is_available(mx.gpu) if wanted == "auto" else wanted == "gpu"
        mx.set_default_device(mx.gpu if gpu else mx.cpu)
        fuse = self.config.system.compile
        if fuse == "never" or (fuse == "auto" and not gpu):
            mx.disable_compile()
        return bool(gpu)

    def _device_name(self) -> str:
        info = self.mx.device_info(self.mx.default_device())
        return str(info.get("device_name", "unknown"))

    def _flops_per_token(self, T: int) -> int:
        from trainer import model

        return model.flops_per_token(self.config.model, self.encoder.vocab_size, T)

    def _facts(self, library: str, half: bool) -> dict[str, Any]:
        from trainer import model

        count = model.num_parameters(self.config.model, self.encoder.vocab_size)
        facts = {
            "device": self._device_name(),
            "dtype": "bfloat16" if half else "float32",
            "parameters": count,
            "parameters_text": f"{count / 1e6:.1f} M",
            "vocab_size": self.encoder.vocab_size,
            "tokens_per_update": self.loop.update_tokens,
            "first_step": self.loop.step + 1,
        }
        return facts if self.gpu else {**facts, "blas": library}

    # ── training ────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """All updates, then the last checkpoint, a sample and the summary."""
        loop, total = self.loop, self.config.training.hyperparameters.iters
        limit = self.config.system.time_limit_s
        every = self.config.logging.steps.checkpoint_interval
        ended = timed_out = False
        last: dict[str, Any] = {}
        while loop.step < total and not ended and not timed_out and self.feed.stop is None:
            try:
                ended = not loop.update(self._next_batch, self._batch_facts)
            except StopWanted:
                break
            if not ended:
                self.committed = list(self.feed.positions)
                last = self._report(loop.metrics()) or last
                faultpoint("trainer:step")
            if loop.step % every == 0 and loop.step not in (self.saved_step, total) and not ended:
                last = self._report(loop.metrics(flush=True)) or last
                self._save()
            self.feed.poll()
            timed_out = limit is not None and time.perf_counter() - self.started > limit
        last = self._report(loop.metrics(flush=True)) or last
        if loop.step != self.saved_step:
            self._save()
        complete = ended or loop.step >= total
        summary = self._summary(last, ended, complete or timed_out)
        if timed_out and not complete:
            summary["stopped"] = f"time limit of {limit} s"
        self.channel.send(ConsumerDone(complete, summary))

    def _next_batch(self) -> list[Any] | None:
        rows: list[Any] = []

        def upload(window: np.ndarray) -> None:
            rows.append(self.mx.array(window))  # copies: the slot may go

        whole = self.feed.take(self.config.training.hyperparameters.batch_size, upload)
        return rows if whole else None

    def _batch_facts(self) -> dict[str, Any]:
        wait_s, self.feed.wait_s = self.feed.wait_s, 0.0
        return {"batch_hash": self.feed.batch_hash(), "wait_s": wait_s}

    def _report(self, metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Send metrics of finished updates; returns the newest."""
        interval = self.config.logging.steps.logging_interval
        for one in metrics:
            if self.peak_flops is not None:
                one["mfu"] = one["tokens_per_s"] * self.flops / self.peak_flops
            if one["step"] % interval == 0 or one["step"] == self.loop.hyper.iters:
                self.channel.send(StepDone(one))
        return metrics[-1] if metrics else None

    def _save(self) -> None:
        cursor = self.feed.cursor(self.committed)
        self.feed.reserve(self.checkpoint.largest_bytes(self.loop))
        begin = time.perf_counter()
        keep = self.config.logging.keep_checkpoints
        path, size = self.checkpoint.save(self.loop, self.run_dir, cursor, keep)
        self.saved_step = self.loop.step
        self.channel.send(CheckpointWritten(self.loop.step, str(path), size, cursor))
        self.loop.pause(time.perf_counter() - begin)

    def _summary(self, last: dict[str, Any], ended: bool, sample: bool) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "steps": self.loop.step,
            "tokens": self.loop.tokens,
            "first_loss": self.loop.first_loss,
            "loss": last.get("loss"),
            "stream_ended": ended,
            "unused_tokens": self.feed.unused_tokens() if ended else 0,
        }
        prompt = self.config.logging.sample_prompt
        if sample and prompt is not None:
            summary["sample"] = prompt + self._sample(prompt)
        return summary

    def _sample(self, prompt: str) -> str:
        from mlx.utils import tree_unflatten

        from trainer.generate import generate

        self.loop.model.update(tree_unflatten(list(self.loop.weights.items())))
        tokens = self.config.logging.sample_tokens
        return "".join(generate(self.loop.model, self.encoder, prompt, max_tokens=tokens))
