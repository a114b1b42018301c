"""Model and optimizers against float64 references in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline import model_size, settings
from pipeline.config import Config, Hyperparameters, Optimization
from trainer import blas

blas.preload()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

from trainer import model as llama  # noqa: E402
from trainer import optim  # noqa: E402
from trainer.loop import Loop  # noqa: E402
from trainer.model import Llama  # noqa: E402

RNG = np.random.default_rng(0)
mx.set_default_device(mx.cpu)
mx.disable_compile()  # on the CPU every fused kernel costs a run of the C++ compiler


def newton_schulz(G: np.ndarray, steps: int) -> np.ndarray:
    """Keller Jordan's iteration in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (np.linalg.norm(G) + 1e-7)
    if G.shape[0] > G.shape[1]:
        X = X.T
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if G.shape[0] > G.shape[1] else X


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 40)])
def test_orthogonalize_is_newton_schulz(shape: tuple[int, int]) -> None:
    stack = RNG.normal(size=(3, *shape))
    got = np.array(optim.orthogonalize(mx.array(stack.astype(np.float32)), 5))
    for one, expected in zip(got, stack, strict=True):
        np.testing.assert_allclose(one, newton_schulz(expected, 5), atol=2e-4)
        singular = np.linalg.svd(one, compute_uv=False)
        assert 0.5 < singular.min() <= singular.max() < 1.3


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_and_adamw_are_their_references_over_five_updates(nesterov: bool) -> None:
    shapes = {
        "layers.0.q": (12, 12), "layers.0.up": (20, 12), "layers.0.down": (12, 20),
        "layers.0.norm": (12,), "embed.weight": (30, 12),
    }  # fmt: skip
    weights = {name: RNG.normal(size=shape) for name, shape in shapes.items()}
    hyper = Hyperparameters(learning_rate=0.02, weight_decay=0.1)
    options = Optimization(nesterov=nesterov, adamw_learning_rate=0.003)
    ours = {name: mx.array(w.astype(np.float32)) for name, w in weights.items()}
    state = optim.init(ours, options)
    momentum = {name: np.zeros(shape) for name, shape in shapes.items()}
    moments = {name: (np.zeros(shape), np.zeros(shape)) for name, shape in shapes.items()}
    for step in range(1, 6):
        rate = 1.0 / step
        gradients = {name: RNG.normal(size=shape) for name, shape in shapes.items()}
        ours, state = optim.apply(
            ours, {n: mx.array(g.astype(np.float32)) for n, g in gradients.items()}, state,
            mx.array(rate), options, hyper, mx.float32,
        )  # fmt: skip
        for name, g in gradients.items():
            w = weights[name]
            if name.startswith("layers") and g.ndim == 2:
                m = momentum[name] = 0.95 * momentum[name] + 0.05 * g
                look = 0.95 * m + 0.05 * g if nesterov else m
                scale = max(1.0, g.shape[0] / g.shape[1]) ** 0.5
                lr = 0.02 * rate
                weights[name] = w * (1 - lr * 0.1) - lr * scale * newton_schulz(look, 5)
            else:
                first, second = moments[name]
                first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * g * g
                moments[name] = first, second
                lr = 0.003 * rate
                update = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
                decay = 0.1 if g.ndim == 2 else 0.0
                weights[name] = w * (1 - lr * decay) - lr * update
    for name, expected in weights.items():
        np.testing.assert_allclose(np.array(ours[name]), expected, atol=3e-4)


def tiny(**hyper: float) -> Config:
    return settings.load(
        "demo",
        {
            "model.dimensions.hidden_size": 32,
            "model.dimensions.intermediate_size": 64,
            "model.dimensions.num_layers": 2,
            "data.preprocessing.max_context_size": 16,
            "data.tokenizer.vocab_size": 300,
            "training.scheduler.warmup_steps": 0,
            **{f"training.hyperparameters.{key}": value for key, value in hyper.items()},
        },
    )


def batch(size: int, seed: int) -> list[mx.array]:
    rng = np.random.default_rng(seed)
    return [mx.array(rng.integers(0, 300, 17).astype(np.uint16)) for _ in range(size)]


def test_accumulation_is_one_large_batch_to_rounding() -> None:
    rows = batch(8, 1)
    ends = []
    for size, steps in ((8, 1), (1, 8)):
        loop = Loop(tiny(batch_size=size, gradient_accumulation_steps=steps), 300, mx.float32)
        parts = iter([rows[at : at + size] for at in range(0, 8, size)])
        loop.update(lambda parts=parts: next(parts), lambda: {"wait_s": 0.0})  # type: ignore[misc]
        ends.append((loop.metrics(flush=True)[0], loop.weights))
    (one, weights), (other, same) = ends
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for name, array in weights.items():
        np.testing.assert_allclose(np.array(array), np.array(same[name]), atol=2e-3)


def test_an_update_that_is_not_finite_changes_nothing_and_eight_end_the_run() -> None:
    loop = Loop(tiny(batch_size=2, gradient_accumulation_steps=1), 300, mx.float32)
    most = loop.config.training.guards.max_skipped
    loop.update(lambda: batch(2, 0), lambda: {"wait_s": 0.0})
    before = {name: np.array(array) for name, array in loop.weights.items()}
    poison = mx.full(loop.weights["norm.weight"].shape, mx.nan)
    good = loop.weights["norm.weight"]
    loop.weights["norm.weight"] = poison
    loop.update(lambda: batch(2, 1), lambda: {"wait_s": 0.0})
    after = loop.metrics(flush=True)
    assert [one["skipped_updates"] for one in after] == [0, 1]
    loop.weights["norm.weight"] = good
    for name, array in loop.weights.items():
        np.testing.assert_array_equal(np.array(array), before[name])
    loop.weights["norm.weight"] = poison
    with pytest.raises(Exception, match=f"{most} updates in a row"):
        for number in range(most + 1):
            loop.update(lambda number=number: batch(2, number), lambda: {"wait_s": 0.0})  # type: ignore[misc]
            loop.metrics()


@pytest.mark.parametrize(
    ("name", "vocab_size", "total"),
    [
        ("model-config-80m-fineweb", 32_000, 174_351_360),
        ("model-config-80m-fineweb", 50_257, 193_046_528),
        ("llama-80m", 32_000, 81_200_000),
        ("demo", 1_024, None),
    ],
)
def test_parameters_are_counted_right(name: str, vocab_size: int, total: int | None) -> None:
    config = settings.load(name, {}).model
    counted = model_size.num_parameters(config, vocab_size)
    assert total is None or counted == total
    if name == "demo":
        model = Llama(config, vocab_size)
        assert counted == sum(a.size for _, a in tree_flatten(model.parameters()))
    if vocab_size == 32_000 and name.endswith("fineweb"):
        assert model_size.flops_per_token(config, vocab_size, 2048) == pytest.approx(
            1.348e9, rel=1e-3
        )


def test_untied_biased_models_are_counted_too() -> None:
    changes = {
        "model.misc.tie_word_embeddings": False,
        "model.misc.attention_bias": True,
        "model.misc.mlp_bias": True,
    }
    config = settings.load("demo", changes).model
    model = Llama(config, 500)
    counted = sum(a.size for _, a in tree_flatten(model.parameters()))
    assert model_size.num_parameters(config, 500) == counted


def test_the_cache_gives_the_same_logits_as_the_whole_text() -> None:
    config = tiny().model
    model = Llama(config, 300)
    llama.initialize(model, config)
    tokens = mx.array(RNG.integers(0, 300, (1, 12)))
    whole = np.array(model(tokens))
    cache: llama.Cache = [None] * len(model.layers)
    steps = []
    for at in range(12):
        logits, cache = model.step(tokens[:, at : at + 1], cache)
        steps.append(np.array(logits[:, 0]))
    np.testing.assert_allclose(np.stack(steps, 1), whole, atol=1e-4)


def test_attention_is_causal() -> None:
    config = tiny().model
    model = Llama(config, 300)
    llama.initialize(model, config)
    tokens = RNG.integers(0, 300, (1, 12))
    changed = tokens.copy()
    changed[0, 7] += 1
    a, b = np.array(model(mx.array(tokens))), np.array(model(mx.array(changed % 300)))
    np.testing.assert_array_equal(a[0, :7], b[0, :7])
    assert np.abs(a[0, 7:] - b[0, 7:]).max() > 1e-4


def gradients_of(
    model: Llama, rows: mx.array, **options: object
) -> tuple[float, dict[str, np.ndarray]]:
    weights = dict(tree_flatten(model.parameters()))

    def loss(weights: dict[str, mx.array]) -> mx.array:
        model.update(tree_unflatten(list(weights.items())))
        return llama.losses(model, rows, mx.float32, **options).sum()  # type: ignore[arg-type]

    value, gradients = mx.value_and_grad(loss)(weights)
    found = {name: np.array(array) for name, array in gradients.items()}
    model.update(tree_unflatten(list(weights.items())))
    return float(value.item()), found


@pytest.mark.parametrize("eot", [None, 7])
def test_layers_computed_again_give_the_same_gradients_from_less_memory(eot: int | None) -> None:
    config = tiny().model
    model = Llama(config, 300)
    llama.initialize(model, config)
    rows = mx.array(RNG.integers(0, 300, (4, 129)))
    results, peaks = [], []
    for recompute in (False, True):
        mx.clear_cache()
        mx.reset_peak_memory()
        results.append(gradients_of(model, rows, eot=eot, recompute=recompute))
        peaks.append(mx.get_peak_memory())
    (loss, kept), (same, again) = results
    assert loss == pytest.approx(same, rel=1e-6)
    for name, array in kept.items():
        np.testing.assert_allclose(again[name], array, atol=1e-4)
    assert peaks[1] < peaks[0]


def test_masked_documents_are_as_if_each_stood_alone_at_position_zero() -> None:
    """Which is also why there is nothing to reset: RoPE sees differences of positions only."""
    config = tiny().model
    model = Llama(config, 300)
    llama.initialize(model, config)
    documents = [[11, 12, 13], [7, 21, 22, 23, 24], [7], [7, 31, 32]]
    window = mx.array([list(itertools.chain(*documents))])
    together = np.array(model(window, eot=7))[0]
    alone = np.concatenate([np.array(model(mx.array([one])))[0] for one in documents])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(np.array(model(window))[0] - alone).max() > 1e-3


@pytest.mark.parametrize(("batch", "tied"), [(1, True), (5, True), (5, False)])
def test_the_loss_in_chunks_is_the_loss(batch: int, tied: bool) -> None:
    """5 × 128 rows are two chunks and a half."""
    config = settings.load(
        "demo", {"model.dimensions.num_layers": 1, "model.misc.tie_word_embeddings": tied}
    ).model
    model = Llama(config, 300)
    llama.initialize(model, config)
    weights = {name: 3 * a for name, a in tree_flatten(model.parameters())}
    rows = mx.array(RNG.integers(0, 300, (batch, 129)).astype(np.uint16))

    def whole(weights: dict[str, mx.array]) -> mx.array:
        model.update(tree_unflatten(list(weights.items())))
        return llama.losses(model, rows, mx.float32).sum() / 7

    def chunked(weights: dict[str, mx.array]) -> mx.array:
        model.update(tree_unflatten(list(weights.items())))
        return llama.loss_sum_chunked(model, rows) / 7

    (loss, kept), (same, got) = (mx.value_and_grad(f)(weights) for f in (whole, chunked))
    assert loss.item() == pytest.approx(same.item(), rel=1e-5)
    for name, array in kept.items():
        expected = np.array(array)
        np.testing.assert_allclose(
            np.array(got[name]), expected, atol=1e-5 * np.abs(expected).max()
        )
