"""A checkpoint in the layout of Hugging Face: what transformers, mlx-lm, vLLM and llama.cpp load.

Runs in: the command line's own process, for `export`.

    config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np

from pipeline import encoding
from pipeline.errors import ConfigError
from pipeline.model_size import shape_of
from trainer import hf_tokenizer
from trainer.optim import Arrays
from trainer.saved import Saved

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def export(saved: Saved, out: Path, dtype: str) -> None:
    """Write the folder: aside, then renamed.

    Args:
        saved: The model.
        out: A folder that is not there yet.
        dtype: Of the weights: float32 keeps them as they are.

    Raises:
        ConfigError: the folder is there.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already", "give another --out, or delete it")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = saved.config.data.tokenizer
    encoder = saved.encoder
    whole = encoding.whole(tokenizer.name)
    described = hf_tokenizer.tokenizer_json(whole, encoder.vocab_size, encoder.eot)
    name = next(t["content"] for t in described["added_tokens"] if t["id"] == encoder.eot)
    texts = {
        "config.json": config_json(saved, dtype),
        "generation_config.json": {
            "bos_token_id": encoder.eot,
            "eos_token_id": encoder.eot,
            "do_sample": True,
            "temperature": 0.8,
            "top_p": 0.95,
        },
        "tokenizer.json": described,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": name,
            "eos_token": name,
            "model_max_length": saved.config.data.preprocessing.max_context_size,
            "clean_up_tokenization_spaces": False,
        },
    }
    for filename, content in texts.items():
        (partial / filename).write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    arrays = {name: a.astype(DTYPES[dtype]) for name, a in renamed(saved).items()}
    with (partial / "model.safetensors").open("wb") as file:
        mx.save_safetensors(file, arrays, {"format": "pt"})
        file.flush()
        os.fsync(file.fileno())
    partial.rename(out)


def config_json(saved: Saved, dtype: str) -> dict[str, Any]:
    """The model as transformers' LlamaConfig names its parts."""
    model, encoder = saved.config.model, saved.encoder
    heads, kv_heads, head_dim = shape_of(model)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": encoder.vocab_size,
        "hidden_size": model.dimensions.hidden_size,
        "intermediate_size": model.dimensions.intermediate_size,
        "num_hidden_layers": model.dimensions.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": saved.config.data.preprocessing.max_context_size,
        "rms_norm_eps": model.normalization.rms_norm_eps,
        "rope_theta": model.rope.theta,
        "rope_scaling": None,
        "attention_bias": model.misc.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": model.misc.mlp_bias,
        "tie_word_embeddings": model.misc.tie_word_embeddings,
        "bos_token_id": encoder.eot,
        "eos_token_id": encoder.eot,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def renamed(saved: Saved) -> Arrays:
    """All weights under transformers' names, rotary halves in its order."""
    heads, kv_heads, head_dim = shape_of(saved.config.model)
    arrays = {}
    for name, array in saved.weights.items():
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name and saved.config.model.rope.traditional:
                array = _halves(array, count, head_dim)  # noqa: PLW2901
        arrays[name if name.startswith("lm_head") else f"model.{name}"] = array
    return arrays


def _halves(array: mx.array, heads: int, head_dim: int) -> mx.array:
    """Rows of a projection whose rotary pairs are neighbours, with the pairs half a head apart."""
    order = np.arange(head_dim).reshape(-1, 2).T.reshape(-1)
    split = array.reshape(heads, head_dim, *array.shape[1:])
    return split[:, mx.array(order)].reshape(array.shape)
