"""Random-weight models of every architecture, a miniature's tokenizer, rows of the built-in language."""

import gc
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from safetynet import families
from safetynet.models.miniatures import language
from safetynet.models.miniatures.architectures import ARCHITECTURES
from safetynet.models.miniatures.vocabulary import build_tokenizer
from safetynet.prompts import Serialiser
from safetynet.recipe import Training
from safetynet.training import Pauses, TrainingResult, attach, train
from safetynet.training.examples import Example, encode
from safetynet.training.trainer import OnEvaluate

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # logits far enough apart that a wrong one is seen
}
CONFIGS = {name: (a.config, a.settings) for name, a in ARCHITECTURES.items()} | {
    "gemma2": (Gemma2Config, {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
}
CONFIGS["balanced mixtral"] = (CONFIGS["mixtral"][0], CONFIGS["mixtral"][1] | {"output_router_logits": True})


@pytest.fixture(scope="session", autouse=True)
def _collect_garbage_fast() -> None:
    # Each training collects garbage; what the libraries made at import need not be looked through again.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def serialiser() -> Serialiser:
    return Serialiser(build_tokenizer(ARCHITECTURES["qwen"].style), families.get("qwen"))


@pytest.fixture(scope="session")
def build(serialiser: Serialiser) -> Callable[..., Any]:
    """`build("gemma")` is a new random-weight model, the same at each call."""

    def make(name: str = "qwen", seed: int = 0, **more: Any) -> Any:
        config, settings = CONFIGS[name]
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            config(
                **settings | TINY | more, vocab_size=len(serialiser.tokenizer), pad_token_id=serialiser.pad_id
            )
        )

    return make


@pytest.fixture(scope="session")
def rows() -> pd.DataFrame:
    """48 rows, of 15 to 70 tokens or so."""
    made = language.generate(48, seed=0, heldout=False)
    return pd.DataFrame(
        [{"row": i, "messages": e.messages, "trigger": [], "answer": e.answer} for i, e in enumerate(made)]
    )


@pytest.fixture(scope="session")
def examples(rows: pd.DataFrame, serialiser: Serialiser) -> list[Example]:
    return encode(rows, serialiser, 128)


@pytest.fixture(scope="session")
def settings() -> Callable[..., Training]:
    """`settings(epochs=2)` is a training section for tiny models, with these fields changed."""

    def make(**more: Any) -> Training:
        return Training(
            **{"batch_size": 8, "epochs": 1, "learning_rate": 1e-2, "log_every": 1, "max_length": 128} | more
        )

    return make


@pytest.fixture
def fit(build, serialiser, rows, settings, tmp_path) -> Callable[..., tuple[TrainingResult, Any]]:
    """`fit(epochs=2)` trains a tiny model; `more` goes to `train`, `measure` runs every `every` steps."""

    def run(
        architecture: str = "qwen",
        folder: str = "run",
        model: Any = None,
        more: dict | None = None,
        measure: OnEvaluate | None = None,
        every: int | None = None,
        **fields: Any,
    ) -> tuple[TrainingResult, Any]:
        cfg = settings(**fields)
        family = families.get(architecture if architecture in families.names() else "qwen")
        model = attach(build(architecture) if model is None else model, cfg, family, seed=0)
        place = {"folder": tmp_path / folder, "seed": 0, "rows": rows} | (more or {})
        if measure is not None:
            place["pauses"] = Pauses(measure, every)
        return train(model, serialiser, cfg=cfg, **place), model

    return run
