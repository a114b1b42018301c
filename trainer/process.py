"""Process: trainer. Windows of the ring in, a trained model out.

It takes windows, updates, reports, checkpoints; all files but the checkpoints are the
supervisor's to write.
"""

from __future__ import annotations

import socket
import time
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import msgspec

from pipeline import checkpoints, encoding, model_size, ranks
from pipeline.channel import Channel
from pipeline.child import Descriptors
from pipeline.config import Config, from_plain
from pipeline.encoding import Encoder
from pipeline.errors import is_disk_full
from pipeline.faults import faultpoint
from pipeline.messages import (
    BatchTaken,
    CheckpointFailed,
    CheckpointWritten,
    ConsumerDone,
    ConsumerReady,
    Cursor,
    Log,
    StepDone,
    TrainerSetup,
)
from shm import ring, segment
from trainer import blas
from trainer.errors import BadUpdatesError
from trainer.feed import Feed, StopWanted

_SLOW_SHARE = 0.02  # of an update: a rank that waits longer for data is named
_SLOW_EVERY_S = 60.0
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

        from trainer import checkpoint, sizing, team
        from trainer.loop import Loop

        self.mx, self.checkpoint, self.teams = mx, checkpoint, team
        self.channel = channel
        self.config: Config = from_plain(setup.config)
        self.run_dir = Path(setup.run_dir)
        self.gpu = self._choose_device()
        self.team = team.Team(setup.rank, setup.size, self.config.ranks.gradients)
        tokenizer = self.config.data.tokenizer
        vocabulary = encoding.vocabulary(tokenizer.name, tokenizer.vocab_size)
        wanted = self.config.system.compute_dtype
        half = wanted == "bfloat16" or (wanted == "auto" and self.gpu)
        model = vocabulary.size, mx.bfloat16 if half else mx.float32, vocabulary.eot
        self.config = sizing.settle(self.config, *model, setup.checkpoint)
        self.loop = Loop(self.config, *model, self.team)
        checkpoint.clean(self.run_dir)
        checkpoints.prune(self.run_dir, self.config.logging)
        self.writer = checkpoint.Writer(self.run_dir, self.config.logging)
        if setup.checkpoint is not None:
            checkpoint.restore(self.loop, Path(setup.checkpoint))
        memory = segment.attach(descriptors.ring, ring.size_bytes(setup.ring), writable=False)
        T = self.config.data.preprocessing.max_context_size
        tokens = ring.Ring(memory, setup.ring)
        owned = range(setup.rank, len(setup.positions), setup.size)
        exchange = self.team.exchange
        self.feed = Feed(channel, tokens, setup.positions, T, setup.groups, owned, exchange)
        self.rows: list[Any] | None = None  # of this update, not yet trained on
        self.validation = self._validation(setup, T)
        self.scored = (-1, 0.0)  # step of the newest validation, and its loss
        self.last: dict[str, Any] = {}  # metrics of the newest update
        self.begun = False  # it has had a batch
        self.committed = list(setup.positions)  # consumed by whole updates
        self.saved_step = self.loop.step if setup.checkpoint is not None else -1
        self.hosts = self._meet()
        self.slow_said_s = 0.0
        self.flops = self._flops_per_token(T)
        self.peak_flops = PEAK_FLOPS.get(self._device_name())
        size = checkpoint.largest_bytes(self.loop) if self.first else 0
        self.channel.send(ConsumerReady(size, self._facts(library, half)))

    @property
    def first(self) -> bool:
        """Whether this rank looks, and writes checkpoints."""
        return self.team.number == 0

    def _meet(self) -> list[str]:
        """Begin where rank 0 begins: its weights, state and counts. Returns the hosts' names."""
        loop = self.loop
        key = cast(list[Any], self.mx.random.state)[0].tolist()
        facts = (socket.gethostname(), loop.step, loop.tokens, loop.first_loss, key,
                 self.saved_step)  # fmt: skip
        said = [msgspec.json.decode(one) for one in self.team.exchange(msgspec.json.encode(facts))]
        _, loop.step, loop.tokens, loop.first_loss, (high, low), self.saved_step = said[0]
        self._take_over()
        self.mx.random.seed((int(high) << 32) | int(low))
        return [one[0] for one in said]

    def _take_over(self) -> None:
        """Rank 0's weights and state."""
        if self.team.size > 1:
            self.loop.weights = self.team.from_first(self.loop.weights)
            state = self.loop.state
            self.loop.state = {part: self.team.from_first(state[part]) for part in state}

    @cached_property
    def encoder(self) -> Encoder:
        """Made when text is, so that the first batch does not wait for it."""
        tokenizer = self.config.data.tokenizer
        return encoding.load(tokenizer.name, tokenizer.vocab_size)

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

    def _validation(self, setup: TrainerSetup, T: int) -> Any:
        from trainer.validation import Validation

        if setup.validation is None:
            return None
        tokenizer, batch = self.config.data.tokenizer, self.loop.batch_windows
        eot = self.loop.eot
        return Validation(Path(setup.validation), tokenizer, self.encoder, T, batch, eot)

    def _flops_per_token(self, T: int) -> int:
        return model_size.flops_per_token(self.config.model, self.loop.vocab_size, T)

    def _facts(self, library: str, half: bool) -> dict[str, Any]:
        count = model_size.num_parameters(self.config.model, self.loop.vocab_size)
        facts = {
            "device": self._device_name(),
            "dtype": "bfloat16" if half else "float32",
            "parameters": count,
            "parameters_text": f"{count / 1e6:.1f} M",
            "vocab_size": self.loop.vocab_size,
            "tokens_per_update": self.loop.update_tokens,
            "batch_windows": self.loop.batch_windows,
            "first_step": self.loop.step + 1,
            **({"ranks": self.team.size} if self.team.size > 1 else {}),
        }
        return facts if self.gpu else {**facts, "blas": library}

    # ── training ────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """All updates, then the last checkpoint and the summary.

        Raises:
            PeerLostError: another rank is gone.
        """
        try:
            self._run()
        except RuntimeError as error:
            if self.team.size > 1 and self.teams.is_lost(error):
                raise self.teams.lost(error) from error
            raise

    def _run(self) -> None:
        loop, total = self.loop, self.loop.hyper.iters
        if (limit := self.config.system.time_limit_s) is not None:
            self.feed.deadline_s = time.monotonic() + limit
        ended = False
        while loop.step < total:
            try:
                ended = not loop.update(self._next_batch, self._batch_facts)
                if ended:
                    break
                self._after_update()
            except StopWanted:
                break
            except BadUpdatesError as error:
                raise self._explained(error) from None
        complete = ended or loop.step >= total
        timed_out = not complete and time.monotonic() >= self.feed.deadline_s
        sample = self._finish(look=complete or timed_out)
        summary = self._summary(ended, sample)
        if timed_out:
            summary["stopped"] = f"time limit of {self.config.system.time_limit_s} s"
        self.channel.send(ConsumerDone(complete, summary))

    def _after_update(self) -> None:
        self.committed = list(self.feed.positions)
        self._report(self.loop.metrics())
        faultpoint("trainer:step")
        self._between_updates()
        self.feed.poll()

    def _explained(self, error: BadUpdatesError) -> BadUpdatesError:
        """The same error with what the last update was trained on."""
        places = self.feed.provenance(*error.facts["positions"])
        return BadUpdatesError(f"{error.what}. It was trained on {'; '.join(places)}", {})

    def _between_updates(self) -> None:
        """What is due after this update: validation, a checkpoint, news of the one in writing.
        The last update's come at the end."""
        step, every = self.loop.step, self.config.logging.steps
        if step < self.loop.hyper.iters:
            save = step % every.checkpoint_interval == 0 and step != self.saved_step
            look = (
                self.first
                and self.validation is not None
                and (
                    step % every.validation_interval == 0
                    or (save and self.config.logging.keep_best)
                )
            )
            if look or save:
                self._report(self.loop.metrics(flush=True), self._look() if look else {})
            if save:
                self._save()
        self._settle(wait=False)

    def _finish(self, *, look: bool) -> str | None:
        """The last look at the model, where the run has come to an end of its own, and the last
        checkpoint."""
        unsaved = self.loop.step != self.saved_step
        said = self._look() if look and self.loop.step else {}
        self._report(self.loop.metrics(flush=True), said)
        if unsaved:
            self._save()
        self._settle(wait=True)
        sample = said.get("sample")
        return None if sample is None else str(sample)

    def _look(self) -> dict[str, Any]:
        """Validation and a sample of the newest weights; it takes no time of an update's. Rank 0
        does so, and the others wait for it."""
        begin = time.perf_counter()
        said: dict[str, Any] = {}
        if not self.first:
            return said
        if self.validation is not None:
            score = self.validation.score(self.loop.model, self.loop.weights, self.loop.dtype)
            said |= score.metrics()
            self.scored = self.loop.step, score.loss
        prompt = self.config.logging.sample_prompt
        if prompt is not None:
            said["sample"] = prompt + self._sample(prompt)
        seconds = time.perf_counter() - begin
        self.loop.pause(seconds)
        return {**said, "look_s": seconds} if said else {}

    def _next_batch(self) -> list[Any] | None:
        """Rows of the next micro-step: the first of an update takes all of its rows."""
        if self.rows is None:
            windows = self.loop.batch_windows * self.loop.hyper.gradient_accumulation_steps
            self.rows = self.feed.take(windows, self.mx.array)  # copies: the slot may go
            if self.rows is None:
                return None
            if not self.begun:
                self.begun = True
                self.channel.send(BatchTaken())
        B = self.loop.batch_windows
        batch, self.rows = self.rows[:B], self.rows[B:]
        return batch

    def _batch_facts(self) -> dict[str, Any]:
        """Of the update that was just launched."""
        self.rows = None
        wait_s, self.feed.wait_s = max(self.feed.waits_s), 0.0
        positions = self.committed, list(self.feed.positions)
        facts = {"batch_hash": self.feed.batch_hash, "wait_s": wait_s, "positions": positions}
        if self.team.size > 1:
            facts["ranks_sync_s"], self.feed.sync_s = self.feed.sync_s, 0.0
            facts["all_reduce_s"] = self.team.all_reduce_s
            facts["all_reduce_bytes"] = self.team.all_reduce_bytes
            facts["slowest_rank"] = self.feed.waits_s.index(wait_s) if wait_s else None
        return facts | {f"mix_{name}": share for name, share in self.feed.mix().items()}

    def _name_slow(self, metrics: dict[str, Any]) -> None:
        """Whose data the update has waited for: the job is as slow as its slowest host."""
        number, share = metrics.get("slowest_rank"), metrics["data_wait_share"]
        now = time.monotonic()
        if number is None or share < _SLOW_SHARE or now - self.slow_said_s < _SLOW_EVERY_S:
            return
        self.slow_said_s = now
        who = {"rank": number, "host": self.hosts[number], "wait_share": round(share, 4)}
        self.channel.send(Log("warning", "rank_waits_for_data", who))

    def _report(self, metrics: list[dict[str, Any]], look: dict[str, Any] | None = None) -> None:
        """Send metrics of finished updates; what a look says belongs to the newest."""
        if metrics:
            self.last = metrics[-1]
            self.last |= look or {}
        interval = self.config.logging.steps.logging_interval
        for one in metrics:
            self._name_slow(one)
            if self.peak_flops is not None:
                one["mfu"] = one["tokens_per_s"] * self.flops / self.peak_flops / self.team.size
            shown = one["step"] % interval == 0 or one["step"] == self.loop.hyper.iters
            if shown or (look and one is self.last):
                self.channel.send(StepDone(one))

    # ── checkpoints ─────────────────────────────────────────────────────────────────────────

    def _save(self) -> None:
        """Begin a checkpoint of this moment; training goes on while it is written. Rank 0 writes
        it, with the cursors of all."""
        self._settle(wait=True)
        begin = time.perf_counter()
        cursor = self._whole_cursor()
        if self.first:
            self.feed.reserve(self.checkpoint.largest_bytes(self.loop))
            loss = self.scored[1] if self.scored[0] == self.loop.step else None
            self.writer.begin(self.checkpoint.snapshot(self.loop, cursor, loss))
        self.saved_step = self.loop.step
        self.loop.pause(time.perf_counter() - begin)

    def _whole_cursor(self) -> Cursor:
        """Of all lanes. Ranks whose weights have drifted apart (other chips round otherwise) go on
        with rank 0's."""
        mine = self.feed.cursor(self.committed)
        bits = self.teams.checksum([self.loop.weights, *self.loop.state.values()])
        said = self.team.exchange(msgspec.msgpack.encode((mine, bits)))
        parts = [msgspec.msgpack.decode(one, type=tuple[Cursor, int]) for one in said]
        others = [number for number, (_, sum_of_bits) in enumerate(parts)
                  if sum_of_bits != parts[0][1]]  # fmt: skip
        if others:
            hosts = [self.hosts[number] for number in others]
            fields = {"step": self.loop.step, "ranks": others, "hosts": hosts}
            self.channel.send(Log("warning", "ranks_differed", fields))
            self._take_over()
        return ranks.merged([cursor for cursor, _ in parts])

    def _settle(self, *, wait: bool) -> None:
        """Tell of a checkpoint that has been written; one that met a full disk is written again
        when the supervisor says so."""
        while self.writer.busy and (wait or self.writer.done):
            try:
                state, path, size = self.writer.result()
            except OSError as error:
                if not is_disk_full(error):
                    raise
                self.checkpoint.clean(self.run_dir)
                self.channel.send(CheckpointFailed(f"{self.run_dir}: {error.strerror}"))
                self.feed.reserve(self.checkpoint.largest_bytes(self.loop))
                self.writer.begin()
            else:
                self.channel.send(CheckpointWritten(state.step, str(path), size, state.cursor))

    # ── the end ─────────────────────────────────────────────────────────────────────────────

    def _summary(self, ended: bool, sample: str | None) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "steps": self.loop.step,
            "tokens": self.loop.tokens,
            "first_loss": self.loop.first_loss,
            "loss": self.last.get("loss"),
            "stream_ended": ended,
            "unused_tokens": self.feed.unused_tokens() if ended else 0,
        }
        if mix := self.feed.mix():
            summary["mix"] = mix
        for key in ("val_loss", "val_ppl", "val_bpb"):
            if key in self.last:
                summary[key] = self.last[key]
        if sample is not None:
            summary["sample"] = sample
        return summary

    def _sample(self, prompt: str) -> str:
        from mlx.utils import tree_unflatten

        from trainer.generate import generate
        from trainer.model import as_dtype

        weights = as_dtype(self.loop.weights, self.loop.dtype)
        self.loop.model.update(tree_unflatten(list(weights.items())))
        tokens = self.config.logging.sample_tokens
        return "".join(generate(self.loop.model, self.encoder, prompt, max_tokens=tokens))
