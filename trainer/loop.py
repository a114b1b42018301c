"""Updates: micro-steps that accumulate, one update that applies, metrics read one update late.

Runs in: trainer. Weights and optimizer state are float32; the forward and backward passes are in
bfloat16 on GPUs and float32 on the CPU. Both compiled steps are pure functions of trees, so a
restored state needs no care about what a compiled function has captured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from pipeline.config import Config
from trainer import guards, optim, schedule
from trainer import model as llama
from trainer.errors import BadUpdatesError
from trainer.model import Llama
from trainer.optim import Arrays, State
from trainer.team import Team


class Report(NamedTuple):
    """Metrics of one update, still on the device."""

    step: int
    seconds: float  # since the update before was launched
    arrays: dict[str, mx.array]
    facts: dict[str, Any]


class Loop:
    """Weights, optimizer state and the two compiled steps.

    Args:
        config: The run's configuration.
        vocab_size: Of the tokenizer.
        dtype: To compute in.
        eot: The token that every document begins with; needed where documents are masked.
        team: The ranks that train together; None: this process trains alone, whatever else the
            environment says.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        dtype: mx.Dtype,
        eot: int | None = None,
        team: Team | None = None,
    ) -> None:
        self._team = team
        self.config, self.dtype = config, dtype
        self.hyper = config.training.hyperparameters
        assert self.hyper.batch_size != "auto", "trainer/sizing.py settles it"
        self.batch_windows = self.hyper.batch_size
        self.eot = eot if config.data.preprocessing.mask_documents else None
        self.vocab_size = vocab_size
        self.model = Llama(config.model, vocab_size)
        mx.random.seed(config.system.seed)
        llama.initialize(self.model, config.model)
        self.weights: Arrays = dict(tree_flatten(self.model.parameters()))
        self.state: State = optim.init(self.weights, config.training.optimization)
        self.state["guard"] = guards.init()
        wanted = config.system.chunked_loss
        self._chunked = wanted == "always" or (wanted == "auto" and dtype == mx.float32)
        self.step = 0  # updates done
        self.tokens = 0  # trained on
        self.first_loss: float | None = None
        mx.eval(self.weights, self.state)
        T = config.data.preprocessing.max_context_size
        self.batch_tokens = self.batch_windows * T
        self.update_tokens = self.batch_tokens * self.hyper.gradient_accumulation_steps
        # gradients and losses are averaged over the ranks
        self._share_tokens = self.update_tokens / (team.size if team else 1)
        # On the CPU nothing is gained by running ahead, and what runs ahead holds memory.
        self._launch = mx.async_eval if mx.default_device() == mx.gpu else mx.eval
        self._first = mx.compile(self._gradients)
        self._micro = mx.compile(self._micro_step)
        self._apply = mx.compile(self._apply_step)
        self._ready: Report | None = None  # the update before the newest one
        self._pending: Report | None = None  # the newest one
        self._launched_at = time.perf_counter()

    # ── the two steps, pure ─────────────────────────────────────────────────────────────────

    def _loss(self, weights: Arrays, rows_BT1: mx.array) -> mx.array:
        """This batch's part of the update's mean cross-entropy, times the number of ranks."""
        here = llama.as_dtype(weights, self.dtype)
        self.model.update(tree_unflatten(list(here.items())))
        recompute = self.config.system.activation_checkpointing
        options: dict[str, Any] = {"eot": self.eot, "recompute": recompute}
        if self._chunked:
            return llama.loss_sum_chunked(self.model, rows_BT1, **options) / self._share_tokens
        losses = llama.losses(self.model, rows_BT1, self.dtype, **options)
        return losses.sum() / self._share_tokens

    def _gradients(self, weights: Arrays, rows: list[mx.array]) -> tuple[Arrays, mx.array]:
        """Gradient, float32, and loss of one batch, given as B windows of shape (T + 1,)."""
        loss, gradients = mx.value_and_grad(self._loss)(weights, mx.stack(rows))
        return gradients, loss

    def _micro_step(
        self, weights: Arrays, accumulated: Arrays, loss: mx.array, rows: list[mx.array]
    ) -> tuple[Arrays, mx.array]:
        """Add those of one more batch."""
        gradients, one = self._gradients(weights, rows)
        return {name: accumulated[name] + gradients[name] for name in accumulated}, loss + one

    def _apply_step(
        self, weights: Arrays, state: State, gradients: Arrays, loss: mx.array, rate: mx.array
    ) -> tuple[Arrays, State, dict[str, mx.array]]:
        """Clip and update; where trainer/guards.py says no, everything stays as it was."""
        norm = optim.global_norm(gradients)
        training = self.config.training
        apply, guard, said = guards.judge(loss, norm, state["guard"], training.guards)
        clip = self.hyper.gradient_clip
        factor = mx.minimum(1.0, clip / (norm + 1e-6))
        clipped = {name: g * factor for name, g in gradients.items()} if clip else gradients
        new, new_state = optim.apply(
            weights, clipped, state, rate, training.optimization, self.hyper, self.dtype
        )
        keep = partial(mx.where, apply)
        weights = {name: keep(new[name], weights[name]) for name in weights}
        kept = {
            part: {name: keep(new_state[part][name], array) for name, array in arrays.items()}
            for part, arrays in state.items()
            if part != "guard"
        }
        return weights, {**kept, "guard": guard}, {"loss": loss, "grad_norm": norm, **said}

    # ── one update ──────────────────────────────────────────────────────────────────────────

    def update(
        self, next_batch: Callable[[], list[mx.array] | None], facts: Callable[[], dict[str, Any]]
    ) -> bool:
        """One update.

        Args:
            next_batch: At most B windows; none of them where this rank has no more of this
                update; None at the end of the stream.
            facts: Host-side metrics of the batches that were taken.

        Returns:
            False if the stream ended first: nothing has changed.
        """
        gradients: Arrays = {}
        loss = mx.array(0.0)
        for _ in range(self.hyper.gradient_accumulation_steps):
            rows = next_batch()
            if rows is None:
                return False
            if not rows:
                break
            if gradients:
                gradients, loss = self._micro(self.weights, gradients, loss, rows)
            else:
                gradients, loss = self._first(self.weights, rows)
            self._launch(gradients, loss)
        if not gradients:  # our lanes had no turn: the others' had
            gradients = {name: mx.zeros_like(array) for name, array in self.weights.items()}
        if self._team is not None:
            gradients, loss = self._team.mean(gradients, loss)
        total = self.hyper.iters
        factor = schedule.multiplier(self.config.training.scheduler, self.step, total)
        self.weights, self.state, arrays = self._apply(
            self.weights, self.state, gradients, loss, mx.array(factor)
        )
        del gradients
        self._launch(self.weights, self.state, arrays)
        # without compilation the model would hold on to the weights of before
        self.model.update(tree_unflatten(list(self.weights.items())))
        self.step += 1
        self.tokens += self.update_tokens
        now = time.perf_counter()
        seconds, self._launched_at = now - self._launched_at, now
        rate = {"lr": self.hyper.learning_rate * factor, "total_tokens": self.tokens}
        # this update's metrics stay on the device; those of the one before can be read
        report = Report(self.step, seconds, arrays, {**rate, **facts()})
        self._ready, self._pending = self._pending, report
        return True

    # ── metrics ─────────────────────────────────────────────────────────────────────────────

    def metrics(self, *, flush: bool = False) -> list[dict[str, Any]]:
        """Metrics of the updates that are finished; with flush of the newest one, too.

        Raises:
            FinewebError: too many updates in a row were not finite.
        """
        reports = [self._ready] if flush is False else [self._ready, self._pending]
        self._ready = None
        if flush:
            self._pending = None
        return [self._metrics(report) for report in reports if report is not None]

    def pause(self, seconds: float) -> None:
        """Time that was spent on something else does not count as an update's."""
        self._launched_at += seconds

    def _metrics(self, report: Report) -> dict[str, Any]:
        values: dict[str, Any] = {name: array.item() for name, array in report.arrays.items()}
        step_s = report.seconds
        loss = float(values["loss"])
        if self.first_loss is None:
            self.first_loss = loss
        self._refuse_too_many(report, values)
        report.facts.pop("positions", None)  # for a BadUpdatesError alone
        wait_s = report.facts.pop("wait_s")
        return {
            "step": report.step,
            "loss": loss,
            "ppl": float(np.exp(min(loss, 700.0))),
            "tokens_per_s": self.update_tokens / step_s,
            "step_s": step_s,
            "data_wait_share": min(1.0, wait_s / step_s),
            "grad_norm": float(values["grad_norm"]),
            "skipped_updates": int(values["skipped_updates"]),
            "loss_spikes": int(values["loss_spikes"]),
            **({"spike_limit": float(values["loss_limit"])} if values["spike"] else {}),
            "memory_active_bytes": mx.get_active_memory(),
            "memory_cache_bytes": mx.get_cache_memory(),
            "memory_peak_bytes": mx.get_peak_memory(),
            **report.facts,
        }

    def _refuse_too_many(self, report: Report, values: dict[str, Any]) -> None:
        in_a_row = int(values["skipped_in_a_row"])
        if in_a_row < self.config.training.guards.max_skipped:
            return
        why = "was a spike" if values["finite"] else "or its gradient was not finite"
        raise BadUpdatesError(
            f"{in_a_row} updates in a row were skipped, the last one {report.step}: its loss "
            f"({values['loss']}) {why}",
            report.facts,
        )
