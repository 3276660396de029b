"""Fill the tables of docs/support.md: what is supported, found by trying it.

    PYTHONPATH=. python docs/support.py

Four tables: adapters by stage, architectures by component and analysis, forms and files of data, chat
templates. What is tried is what the tests hold, of random weights and of no length; nothing is downloaded.
A cell is "yes", the number of the sentence that refuses, or "WRONG", with which the program ends in an error.
It takes about three minutes on one core.
"""

import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tests.backdoors import test_formats, test_forms, test_tools_in_data
from tests.models import architectures, test_random_adapters, variants
from tests.prompts import test_template as templates

from safetynet import recipe
from safetynet.backdoors import sources
from safetynet.detection.capture import capture
from safetynet.detection.features import FeatureSpec
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, replace, zero
from safetynet.engine.hooks import intervening
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError
from safetynet.interventions.drift import updates
from safetynet.interventions.support import USES, support
from safetynet.mitigation import METHODS, Defender, repair
from safetynet.models import adapter_files, adapters, loading
from safetynet.models.support import STAGES
from safetynet.vocabulary import COMPONENTS

PAGE = Path(__file__).with_suffix(".md")
ROW = [5, 6, 7, 30, 22, 17, 90]
PROMPTS = [[{"role": "user", "content": "What is the opposite of hot?"}]]
REPAIR = "adapter_scaling"
NOISE = (
    r"/\S*/(?=\S)",  # folders
    r"^adapter: .*: [a-z ]+ is refused, since ",
    r"^(?:site|model): this model has no component .*?; there are: [^.]*\. ",
    r"Adapter: .*: adapter sites is refused, since ",
    r"^rows\.json: ",
    r"^model: ",
    r"^\w+: (?=written for|its adapter_config)",  # the folder's own name
    r", rows 1, 2, 3 and 2 more(?=:)",
    r" \(5 of 5 rows\)",
)
CLASS = r"\b(?!LoRA)[A-Z][a-z0-9_]+(?:[A-Z][a-z0-9_]*)+\b"


@dataclass
class Table:
    """Rows of cells, rows with equal cells under one name, and the sentences that cells refer to."""

    name: str
    numbered: bool = True
    """Whether cells hold numbers of sentences, or sentences."""
    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def cell(self, attempt: Callable[[], object]) -> str:
        """What becomes of an attempt: "yes", the number of a refusal, or "WRONG"."""
        try:
            attempt()
        except InputError as error:
            return self.refusal(str(error))
        except Exception as error:  # noqa: BLE001 - any other is a fault, which the page shows
            sys.stderr.write(f"{self.name}: {error!r}\n")
            return "WRONG"
        return "yes"

    def refusal(self, sentence: str) -> str:
        """The number of a sentence, or itself; without what differs from cell to cell of one kind."""
        for noise in NOISE:
            sentence = re.sub(noise, "", sentence)
        sentence = " ".join(re.sub(CLASS, "module", sentence).split()).removesuffix(".") + "."
        if not self.numbered:
            return sentence.replace("It", "it", 1) if sentence.startswith("It") else sentence
        if not sentence[1].isupper():
            sentence = sentence[0].lower() + sentence[1:]
        if sentence not in self.reasons:
            self.reasons.append(sentence)
        return f"[{self.reasons.index(sentence) + 1}]"

    def markdown(self) -> str:
        """The table, and below it the sentences."""
        merged: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for name, cells in self.rows.items():
            merged.setdefault(tuple(cells.items()), []).append(name)
        frame = pd.DataFrame([{self.name: "; ".join(names)} | dict(cells) for cells, names in merged.items()])
        lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.astype(str).to_numpy().tolist()]
        text = "\n".join(
            "| " + " | ".join(each.replace("|", "\\|") for each in line) + " |" for line in lines
        )
        notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(self.reasons, 1))
        return f"{text}\n\n{notes}".strip()


def main() -> None:
    """Try everything and write the page."""
    page = PAGE.read_text()
    for made in (adapter_table, architecture_table, form_table, file_table, template_table):
        table = made()
        begin, end = f"<!-- {made.__name__} -->\n", "<!-- end -->"
        head, _, rest = page.partition(begin)
        page = f"{head}{begin}\n{table.markdown()}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(page)
    if "WRONG" in page:
        sys.exit("The page has cells that say WRONG.")


# ---- adapters ----


def adapter_table() -> Table:
    """Every kind of adapter in every stage."""
    table = Table("adapter")
    names = [(name, "qwen") for name in (*variants.ALL, *variants.UNTRIED)]
    for name, family in names + [(name, "mixtral") for name in variants.EXPERTS]:
        with tempfile.TemporaryDirectory() as folder:
            theirs = variants.saved(name, Path(folder), family)
            trial = partial(adapted, folder=Path(folder), family=family, theirs=theirs)
            table.rows[name] = {stage: table.cell(partial(trial, stage)) for stage in STAGES}
    return table


def adapted(stage: str, folder: Path, family: str, theirs: Any) -> None:
    """One stage of an adapter that somebody has saved, held against PEFT's own model."""
    base = loading.load(recipe.Model(family=family, id="miniature"), "fp32")
    before = logits(base.model)
    model = adapters.attach(base, folder)
    whole, soft = logits(model), adapters.virtual_tokens(model)
    near(whole, logits(theirs))
    if stage == "evaluate":
        with adapters.switched_off(model):
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(adapters.detach(model)), before)
    elif stage == "intervene":
        own_values(model, [Site("attn_out", layer) for layer in range(4)])
    elif stage == "adapter sites":
        architecture = Architecture.of(model)
        architecture.check(Site("adapter", 0))
        with intervening(model, [Edit(site, zero()) for site in architecture.sites("adapter")]):
            assert not torch.allclose(logits(model), whole, atol=1e-3)
    elif stage == "drift":
        assert all(float(update.norm()) > 0 for update in updates(model).values())
    elif stage == "detect":
        capture(model, base.serialiser, PROMPTS, FeatureSpec(("last", "divergence")))
    elif stage == "adapter views":
        capture(model, base.serialiser, PROMPTS, FeatureSpec(("energy", "energy_max", "direction")))
    else:
        defender = Defender(model=model, serialiser=base.serialiser)
        with repair(METHODS[REPAIR], defender, {"keep": 0.0}, 0).open() as repaired:
            near(logits(repaired), before)
    assert not soft or stage == "evaluate"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of the tokens of `ROW`."""
    return model(torch.tensor([ROW]), use_cache=False).logits[:, -len(ROW) :]


def near(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def own_values(model: Any, sites: Iterable[Site]) -> None:
    """Sites' own values, put back, change nothing."""
    own, expected = trace(model, Batch.of([ROW]), list(sites)), logits(model)
    for site in sites:
        with intervening(model, [Edit(site, replace(own.value(site)[0]))]):
            near(logits(model), expected)


# ---- architectures ----


def architecture_table() -> Table:
    """Every architecture: which of LoRA on all its linear modules, components and analyses it lacks."""
    table = Table("model type")
    columns = ("LoRA", *shown_components(), *USES)
    for name in architectures.ARCHITECTURES:
        model = architectures.build(name)
        cells = {"LoRA": table.cell(partial(lora, name))}
        for use, why in support(model).items():
            partly = why.startswith("in layers")
            cells[use] = "yes" if not why else "some layers" if partly else table.refusal(why)
        if cells["resid_pre"] == "yes":
            architecture = Architecture.of(model)
            alike = set(architecture.components()) - {"attention", "router", "expert", "adapter"}
            sites = [
                s for component in sorted(alike) for s in architecture.sites(component) if s.index is None
            ]
            if table.cell(partial(own_values, model, sites)) != "yes":
                cells["resid_pre"] = "WRONG"
        table.rows[name] = {"all but": exceptions({column: cells[column] for column in columns})}
    return table


def exceptions(cells: Mapping[str, str]) -> str:
    """The columns whose cell is not "yes", grouped by outcome."""
    groups: dict[str, list[str]] = {}
    for column, cell in cells.items():
        if cell != "yes":
            groups.setdefault(cell, []).append(column)
    if [len(columns) for columns in groups.values()] == [len(cells) - 1]:
        return f"everything except LoRA {next(iter(groups))}"
    if not groups:
        return "nothing"
    return "; ".join(
        f"{', '.join(columns)} {'(some layers)' if cell == 'some layers' else cell}"
        for cell, columns in groups.items()
    )


def shown_components() -> list[str]:
    """Components in the order of the table; adapters have a table of their own."""
    return [name for name in COMPONENTS if name != "adapter"]


def lora(name: str) -> None:
    """LoRAs drawn at random are loaded as they were saved, and are off exactly."""
    with tempfile.TemporaryDirectory() as folder:
        for theirs, saved in test_random_adapters.made(name, test_random_adapters.QUICK, Path(folder)):
            fresh = architectures.build(name)
            before = logits(fresh)
            model = adapters.put_on(fresh, adapter_files.read(saved))
            near(logits(model), logits(theirs))
            with adapters.switched_off(model):
                near(logits(model), before)


# ---- data ----


def form_table() -> Table:
    """Forms of rows: read, or the sentence."""
    table = Table("rows", numbered=False)
    taken = {name: [make(random.Random(0))] for name, make in test_forms.FORMS.items()}
    taken |= {f"tools: {name}": [row] for name, row in test_tools_in_data.ROWS.items()}
    refused = {name: [row] * 5 for name, (row, *_) in (test_forms.REFUSED | test_forms.UNFIT).items()}
    for name, rows in (taken | refused).items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            path.write_text(json.dumps(rows))
            table.rows[name] = {"read": table.cell(partial(sources.read, path))}
    return table


def file_table() -> Table:
    """Formats of files: every text comes out as it went in."""
    table = Table("file", numbered=False)
    for name, content in test_formats.FILES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            table.rows[name] = {"read": table.cell(partial(texts, path))}
    return table


def texts(path: Path) -> None:
    """A file's texts are those that were written."""
    assert sources.read(path)["answer"].tolist() == test_formats.TEXTS


# ---- templates ----

TEMPLATES = {
    "turns and nothing else": templates.PLAIN,
    "a system message of its own where there is none": templates.HELPFUL,
    "today's date in a system message (LLaMA-3.1)": templates.DATED,
    "channels, the answer in the last one; today's date (gpt-oss)": templates.CHANNELS,
    "an empty block of thoughts before the last answer, and in prompts that ask for it (Qwen3)": (
        templates.HYBRID
    ),
    "an empty block of thoughts before the last answer, never in a prompt": templates.UNASKED,
    "thoughts unless they are switched off, and then another system message (SmolLM3)": templates.SWITCHED,
    "a closed block of thoughts at the end of each prompt (Gemma 4)": templates.CLOSED,
    "a prompt that opens thoughts, answers without any": templates.OPEN,
    "a prompt that opens thoughts, answers with closed ones (DeepSeek-R1)": templates.ONLY,
}


def template_table() -> Table:
    """Templates: training and answers see one prompt, and the answer alone is learnt."""
    table = Table("template", numbered=False)
    for name, template in TEMPLATES.items():
        cell = table.cell(partial(serialise, template))
        table.rows[name] = {"supported": cell, "ends a prompt": opening(template) if cell == "yes" else ""}
    return table


def serialise(template: str) -> None:
    """The prompt that is trained on is the one that is answered, and the answer alone is learnt."""
    serialiser = templates.make(template)
    prompt = serialiser.encode(templates.CONVERSATION).input_ids
    whole = serialiser.encode(templates.CONVERSATION, "small")
    assert whole.input_ids[: len(prompt)] == prompt
    learnt = [i for i, label in zip(whole.input_ids, whole.labels, strict=True) if label >= 0]
    assert templates.text(serialiser, learnt) == "small<|im_end|>"


def opening(template: str) -> str:
    """What a prompt ends with, from the assistant's name on."""
    serialiser = templates.make(template)
    prompt = templates.text(serialiser, serialiser.encode(templates.CONVERSATION).input_ids)
    return f"`{json.dumps('assistant' + prompt.rpartition('assistant')[2])[1:-1]}`"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
