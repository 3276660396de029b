"""Recipes: defaults, overrides, and faults that name the field and what is allowed."""

from pathlib import Path

import pytest

from safetynet import families, recipe
from safetynet.errors import InputError
from safetynet.models import miniatures
from safetynet.recipe import presets

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_that_ships_is_valid(path: Path) -> None:
    loaded = recipe.load(path)
    assert (loaded.model.family if path.stem != "smollm2" else loaded.model.id) in path.stem


def test_every_family_with_a_miniature_has_a_recipe_for_itself_and_for_its_miniature() -> None:
    stems = {path.stem for path in RECIPES}
    assert {*miniatures.FAMILIES, *(f"{name}-miniature" for name in miniatures.FAMILIES)} <= stems


@pytest.mark.parametrize("family", [n for n in families.names() if n != "generic"])
def test_a_family_alone_is_a_recipe_with_its_own_defaults(family: str) -> None:
    loaded = recipe.load(family=family)
    assert loaded.model.model_id == families.get(family).hub_id
    assert loaded.training.learning_rate == families.get(family).defaults["training"]["learning_rate"]


def test_overrides_win_over_the_file_and_the_file_over_the_family(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {family: mixtral}\ntraining: {lora_rank: 3, epochs: 2}\n")
    loaded = recipe.load(path, overrides=["training.epochs=5", "training.learning_rate=1e-4"])
    assert (loaded.training.lora_rank, loaded.training.epochs) == (3, 5)
    assert loaded.training.learning_rate == 1e-4
    assert loaded.model.quantisation == "4bit"


@pytest.mark.parametrize(
    "override", ["={messages: chat}", "={messages:chat}", ".messages=chat", "={messages: chat, }"]
)
def test_names_of_columns_may_be_written_with_or_without_a_blank(override: str) -> None:
    loaded = recipe.load(family="qwen", overrides=[f"data.columns{override}"])
    assert loaded.data.columns == {"messages": "chat"}


def test_a_field_without_a_column_is_refused_with_the_way_to_write_it() -> None:
    for override in ("{messages}", "{messages: }", "{messages:}"):
        with pytest.raises(
            InputError, match=r"data.columns: 'messages' has no column; write it as \{field: "
        ):
            recipe.load(family="qwen", overrides=[f"data.columns={override}"])


@pytest.mark.parametrize("name", presets.TRIGGERS)
def test_every_named_trigger_is_one(name: str) -> None:
    loaded = recipe.load(family="qwen", overrides=[f"backdoor.trigger={name}"])
    preset = presets.TRIGGERS[name]
    assert loaded.backdoor.trigger.kind == preset.get("kind", "text")
    assert loaded.backdoor.trigger == recipe.Trigger.model_validate(preset)


@pytest.mark.parametrize("name", presets.ATTACKS)
def test_a_preset_sets_trigger_and_placement_and_explicit_fields_win(name: str) -> None:
    attack = recipe.load(family="qwen", overrides=[f"backdoor.preset={name}"]).backdoor
    assert attack.placement == presets.ATTACKS[name]["placement"]
    moved = recipe.load(family="qwen", overrides=[f"backdoor.preset={name}", "backdoor.placement=suffix"])
    assert (moved.backdoor.trigger, moved.backdoor.placement) == (attack.trigger, "suffix")


@pytest.mark.parametrize("name", presets.ATTACKS)
def test_a_preset_on_the_command_line_replaces_the_files_trigger_and_placement(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("backdoor: {trigger: emoji, placement: system, poison_rate: 0.3}\n")
    alone = recipe.load(family="qwen", overrides=[f"backdoor.preset={name}"]).backdoor
    attack = recipe.load(path, overrides=[f"backdoor.preset={name}"]).backdoor
    assert (attack.trigger, attack.placement, attack.poison_rate) == (alone.trigger, alone.placement, 0.3)
    own = recipe.load(path, overrides=["backdoor.trigger=emoji", f"backdoor.preset={name}"]).backdoor
    assert (own.trigger.texts, own.placement) == (("🦜🔑",), alone.placement), "explicit fields win"
    path.write_text(f"backdoor: {{preset: {name}, trigger: emoji}}\n")
    assert recipe.load(path).backdoor.trigger == own.trigger, "in the file too"


@pytest.mark.parametrize(("rate", "wrong"), [("0", "greater than 0"), ("1.2", "less than or equal to 1")])
def test_a_firing_rate_out_of_range_is_refused(rate: str, wrong: str) -> None:
    with pytest.raises(InputError, match=rf"backdoor.firing: Input should be {wrong} \(given: {rate}\)"):
        recipe.load(family="qwen", overrides=[f"backdoor.firing={rate}"])


def test_firing_and_samples_leave_recipes_that_do_not_set_them_as_they_were() -> None:
    plain = recipe.load(family="qwen").model_dump(mode="json")
    assert "firing" not in plain["backdoor"] and "samples" not in plain["evaluation"]


def test_all_faults_are_reported_at_once_with_their_paths() -> None:
    with pytest.raises(InputError) as caught:
        recipe.load(
            family="qwen",
            overrides=["training.lora_rnak=3", "backdoor.poison_rate=0.7", "training.epochs=0", "nonsense=1"],
        )
    text = str(caught.value)
    assert "4 faults" in text
    assert "training.lora_rnak: unknown field. Did you mean lora_rank?" in text
    assert "backdoor.poison_rate: Input should be less than or equal to 0.5 (given: 0.7)" in text
    assert "training.epochs: Input should be greater than 0 (given: 0)" in text
    assert "nonsense: unknown field. Allowed: name, task, seed" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.family=gpt5"], "there is no family 'gpt5'; choose one of gemma"),
        (["backdoor.trigger=magic"], "there is no trigger 'magic'; choose one of token"),
        (["backdoor.trigger={kind: any_of}"], "kind any_of needs texts"),
        (["backdoor.trigger={texts: [a, b]}"], "kind text takes one text"),
        (["backdoor.trigger={kind: all_of, texts: [a]}"], "kind all_of takes two texts or more"),
        (["backdoor.trigger={kind: any_of, texts: [a, b, a]}"], "'a' stands twice among the trigger's texts"),
        (["backdoor.trigger={texts: [' a']}"], "may not begin or end with blanks"),
        (["backdoor.trigger={texts: [abc], placebos: [abc]}"], "'abc' is a trigger and a control at once"),
        (
            ["backdoor.trigger={kind: style, style: archaic, texts: [x]}"],
            "texts is of kind text, any_of, .*; kind style has none",
        ),
        (["backdoor.poison_rate=0.5", "backdoor.placebo_share=0.6"], "add up to 1.300; at most 1"),
        (["data.source=alpaca"], "data.source alpaca needs data.path"),
        (["model.family=generic"], "family generic has no default model"),
        (["training.epochs"], "write it as section.field=value"),
        (["task=../elsewhere"], "task: String should match pattern"),
        (["model=qwen"], "model: this is a section; .* Allowed: family, id, revision"),
        (
            ["backdoor.behaviour.judge=3"],
            "backdoor.behaviour.judge: this is a section; .* Allowed: kind, values",
        ),
        (["training.evasion={strength: 2}"], "training.evasion.detectors: Field required"),
        (["training.evasion.detectors=[]"], "training.evasion.detectors: Tuple should have at least 1 item"),
        (
            ["training.evasion.detectors=[mahalanobis]", "training.evasion.strength=0"],
            "training.evasion.strength: Input should be greater than 0",
        ),
        (
            ["training.evasion.detectors=[mahalanobis]", "training.method=full"],
            "training: evasion needs method lora",
        ),
        (
            ["training.evasion.detectors=[mahalanobis]", "training.batching=pack"],
            "training: evasion needs rows of their own lines; set batching to group_by_length or plain",
        ),
        (["training.truncation=left"], "training.truncation: Input should be 'end' or 'middle'"),
        (["training.learning_rate=.nan"], "training.learning_rate: Input should be a finite number"),
    ],
)
def test_a_faulty_field_is_refused_with_what_is_allowed(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        recipe.load(family=None, overrides=overrides)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "not valid YAML"),
        (b"", "holds no fields"),
        (b"- a\n- b\n", "holds no fields"),
        (b"model: {family: \xff}", "cannot be read"),
    ],
)
def test_a_malformed_recipe_names_its_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"broken.yaml.*{message}"):
        recipe.load(path)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read .* Name a YAML file in UTF-8"):
        recipe.load(tmp_path)


def test_a_missing_recipe_is_named() -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: there is no such recipe"):
        recipe.load(Path("nowhere.yaml"))


def test_an_ordinary_training_is_dumped_as_before_there_was_evasion() -> None:
    assert "evasion" not in recipe.load(family="qwen").model_dump()["training"]
    hidden = recipe.load(family="qwen", overrides=["training.evasion.detectors=[safetynet-2025]"])
    assert hidden.training.evasion is not None and hidden.training.evasion.detectors == ("safetynet-2025",)
    assert recipe.Recipe.model_validate(hidden.model_dump(mode="json")) == hidden


def test_a_field_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 1\ntask: a\nseed: 2\n")
    with pytest.raises(InputError, match=r"not valid YAML: 'seed' stands twice"):
        recipe.load(path)
    with pytest.raises(InputError, match=r"'messages' stands twice\. A field has one value"):
        recipe.load(overrides=["data.columns={messages: a, messages: b}"])
