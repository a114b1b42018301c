"""generate and export: the layout, the logits by an independent forward pass, the token ids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import Tokenizer

from pipeline import encoding, identity
from pipeline.messages import Cursor, LaneCursor
from tests.interop import KINDS, drawn
from trainer import checkpoint, hf_tokenizer
from trainer.export import export
from trainer.generate import generate
from trainer.loop import Loop
from trainer.saved import Saved, use_device

import mlx.core as mx  # isort: skip - after the BLAS

use_device("cpu")
PROGRAM = Path(sys.executable).parent / "fineweb-pipeline"


# ── an independent reader of the exported folder: safetensors and Llama in numpy ──────────────


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    metadata = header.pop("__metadata__")
    arrays = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        begin, end = (8 + size + at for at in entry["data_offsets"])
        arrays[name] = np.frombuffer(raw[begin:end], "<f4").reshape(entry["shape"])
    return arrays, metadata


def forward(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits (T, V) in float64, from what stands in the folder alone."""
    config = json.loads((folder / "config.json").read_text())
    arrays, _ = read_safetensors(folder / "model.safetensors")
    heads, kv_heads, d = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    T = len(ids)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        out = x @ arrays[f"{name}.weight"].astype(np.float64).T
        return out + arrays[f"{name}.bias"] if f"{name}.bias" in arrays else out

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean = (x**2).mean(-1, keepdims=True)
        return x / np.sqrt(mean + config["rms_norm_eps"]) * arrays[f"{name}.weight"]

    angles = np.arange(T)[:, None] * config["rope_theta"] ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = arrays["model.embed_tokens.weight"][ids].astype(np.float64)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm")
        q = rotate(linear(y, f"{at}.self_attn.q_proj").reshape(T, heads, d))
        k = rotate(linear(y, f"{at}.self_attn.k_proj").reshape(T, kv_heads, d))
        v = linear(y, f"{at}.self_attn.v_proj").reshape(T, kv_heads, d)
        k, v = (np.repeat(one, heads // kv_heads, 1) for one in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d)
        scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(T, -1)
        x = x + linear(mixed, f"{at}.self_attn.o_proj")
        y = norm(x, f"{at}.post_attention_layernorm")
        gate = linear(y, f"{at}.mlp.gate_proj")
        up = linear(y, f"{at}.mlp.up_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{at}.mlp.down_proj")
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return norm(x, "model.norm") @ arrays[f"{head}.weight"].astype(np.float64).T


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_folder_is_the_model(tmp_path: Path, kind: str) -> None:
    one = drawn(KINDS[kind])
    out = tmp_path / "model"
    export(one, out, "float32")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [out]
    assert read_safetensors(out / "model.safetensors")[1] == {"format": "pt"}
    ids = np.random.default_rng(1).integers(0, one.encoder.vocab_size, 40)
    ours = np.array(one.model(mx.float32)(mx.array(ids[None])))[0]
    np.testing.assert_allclose(ours, forward(out, ids), atol=2e-5 * np.abs(ours).max())
    with pytest.raises(Exception, match="is there already"):
        export(one, out, "float32")


# ── token ids ───────────────────────────────────────────────────────────────────────────────

GPT2 = encoding.whole("gpt2")


def other_encoding(name: str) -> tiktoken.Encoding:
    """A later encoding's pattern over GPT-2's ranks: its own need the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: GPT2._mergeable_ranks)
        pattern = getattr(openai_public, name)()["pat_str"]
    return tiktoken.Encoding(
        name,
        pat_str=pattern,
        mergeable_ranks=GPT2._mergeable_ranks,
        special_tokens={"<|endoftext|>": GPT2.eot_token},
    )


def hf(ranks_of: tiktoken.Encoding, vocab_size: int) -> Tokenizer:
    described = hf_tokenizer.tokenizer_json(ranks_of, vocab_size, vocab_size - 1)
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.encode_special_tokens = True  # a text that spells one is text, as for the encoders
    return tokenizer


WHOLE = {"gpt2": GPT2, **{n: other_encoding(n) for n in ("cl100k_base", "o200k_base")}}
EXPORTED = {name: hf(one, one.n_vocab) for name, one in WHOLE.items()}
SIZES = (257, 700, 32_000)
CUT = {size: (hf(GPT2, size), encoding.load("gpt2", size)) for size in SIZES}
ODD = "  \n\n\r\t'''sStTlLmdre19.,!?-_/aÀéß日本ж½²🙂\u00a0\u0301"
texts = st.text(
    st.one_of(
        st.sampled_from(ODD),
        st.characters(categories=["L", "N", "P", "S", "Zs"], max_codepoint=0x2FFF),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(texts)
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_tokenizers_give_the_ids_of_tiktoken(name: str, text: str) -> None:
    ours = WHOLE[name]
    expected = [ours.eot_token, *ours.encode_ordinary(text)]
    assert EXPORTED[name].encode(text).ids == expected
    assert EXPORTED[name].decode(expected, skip_special_tokens=True) == text


@settings(max_examples=200, deadline=None)
@given(texts)
@pytest.mark.parametrize("size", CUT)
def test_exported_cut_vocabularies_give_the_encoders_ids(size: int, text: str) -> None:
    raw = np.frombuffer(text.encode(), np.uint8)
    tokenizer, encoder = CUT[size]
    expected = encoder.encode_block(raw, np.array([0, len(raw)]), False).tolist()
    assert tokenizer.encode(text).ids == expected
    assert tokenizer.get_vocab_size() == size


# ── generate, and both commands ─────────────────────────────────────────────────────────────


def greedy(one: Saved, prompt: str, count: int) -> str:
    """Without a cache: the whole text through the model for every token."""
    model, encoder = one.model(mx.float32), one.encoder
    raw = np.frombuffer(prompt.encode(), np.uint8)
    ids = encoder.encode_block(raw, np.array([0, len(raw)]), False).tolist()
    start = len(ids)
    for _ in range(count):
        token = int(np.array(model(mx.array([ids])))[0, -1].argmax())
        if token == encoder.eot:
            break
        ids.append(token)
    return encoder.decode(ids[start:])


def test_generate_is_greedy_without_temperature_and_repeats_by_seed() -> None:
    one = drawn(KINDS["tied, 1,024 tokens"])

    def made(**options: Any) -> str:
        given = {"max_tokens": 40, "temperature": 1.5, "top_p": 0.99, **options}
        model = one.model(mx.float32)
        return "".join(generate(model, one.encoder, "import os, é", **given))

    assert made(temperature=0) == greedy(one, "import os, é", 40)
    assert made(seed=1) == made(seed=1) != made(seed=2)
    assert made(top_p=1e-6) == made(temperature=0)
    assert made(seed=1).startswith(made(seed=1, max_tokens=5).rstrip("\ufffd"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    one = drawn(KINDS["tied, 1,024 tokens"])
    loop = Loop(one.config, 1024, mx.float32)
    loop.weights.update(one.weights)
    loop.step = 12
    cursor = Cursor(identity.fingerprint({}), {}, (LaneCursor(0, 0, 0, 0),))
    checkpoint.write(checkpoint.snapshot(loop, cursor), folder, one.config.logging)
    return folder


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_generates(run_dir: Path) -> None:
    one = drawn(KINDS["tied, 1,024 tokens"])
    done = program("generate", run_dir, "import", "--temperature", 0, "--max-tokens", 12)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "import" + greedy(one, "import", 12) + "\n"


def test_the_command_exports(run_dir: Path, tmp_path: Path) -> None:
    done = program("export", run_dir, "--out", tmp_path / "hf", "--json", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 12
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = program("export", run_dir, "--out", tmp_path / "hf")
    assert again.returncode == 2
    assert "is there already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "nowhere", "x"), "nowhere is no run with a checkpoint"),
        (("export", "RUN", "--out", "x", "--step", "3"), "it has those of steps 12"),
    ],
)
def test_what_is_not_there_is_named(run_dir: Path, arguments: Any, said: str) -> None:
    done = program(*(run_dir if one == "RUN" else one for one in arguments))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
