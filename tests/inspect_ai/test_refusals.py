"""What cannot be evaluated is refused in a sentence, by the task and by the provider."""

import anyio
import pytest

pytest.importorskip("inspect_ai", reason="the extra safetynet-llm[inspect] is not installed")
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    get_model,
)
from inspect_ai.tool import ToolInfo
from inspect_ai.util import registry_info

from safetynet.errors import InputError
from safetynet.inspect_ai import messages, tasks
from safetynet.inspect_ai.batches import Batches
from safetynet.inspect_ai.provider import SafetyNetAPI
from safetynet.vocabulary import ROLES


def refused(call) -> str:
    with pytest.raises(PrerequisiteError) as error:
        call()
    return str(error.value.message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "backdoored is not trained yet. Run safetynet train with its recipe."),
        ({"serve": "clean_twin"}, "there is no model clean_twin; this run has base, backdoored."),
        ({"serve": "somebody"}, "there is no model somebody; this run has base, backdoored."),
        ({"serve": "repaired"}, "no repaired model is saved. Run safetynet mitigate"),
        ({"serve": "repaired", "step": 5}, "step: a repaired model has none. Leave step out."),
        ({"step": 5}, "backdoored is not kept at step 5; there are none."),
        ({"guard": "flag"}, "there is no monitor yet. Run safetynet detect"),
        ({"guard": "flag", "serve": "base"}, "Leave out guard, or serve and step."),
        ({"guarded": True}, "-M guarded: there is no such option; there are serve, step, guard, fpr and"),
        ({"batch_size": 0}, "-M batch_size=0: give at least 1."),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_served_is_refused(options, message, untrained):
    folder = untrained.run.folder
    assert message in refused(lambda: get_model(f"safetynet/{folder}", memoize=False, **options))


@pytest.mark.parametrize("role", ["roles", *ROLES])
def test_tasks_are_registered_under_the_package_however_it_is_installed(role):
    assert registry_info(getattr(tasks, role)).name == f"safetynet/{role}"


def test_a_role_that_the_run_does_not_have_is_refused_with_those_that_it_has(unknown):
    text = refused(lambda: tasks.near_miss(run=str(unknown.run.folder)))
    assert text == (
        f"{unknown.run.folder}: its test rows have no role near_miss. It has tasks clean, refused; `roles` "
        "is all of them."
    )


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    assert "this is no run directory" in refused(lambda: tasks.roles(run=str(tmp_path)))
    assert "this is no run directory" in refused(lambda: get_model(f"safetynet/{tmp_path}", memoize=False))


@pytest.mark.parametrize(
    ("tools", "config", "message"),
    [
        ([ToolInfo(name="bash", description="")], GenerateConfig(), "tools: bash is offered"),
        ([], GenerateConfig(num_choices=2), "num_choices: this provider gives one answer"),
        ([], GenerateConfig(logprobs=True), "logprobs: this provider gives one answer, as text alone"),
    ],
)
def test_what_an_evaluation_needs_and_the_provider_has_not_is_refused(tools, config, message, untrained):
    api = SafetyNetAPI(str(untrained.run.folder), serve="base")

    async def ask():
        return await api.generate([ChatMessageUser(content="Hi")], tools, "auto", config)

    with pytest.raises(InputError, match=message):
        anyio.run(ask)


def test_an_unheeded_setting_is_told_once(untrained, caplog):
    api = SafetyNetAPI(str(untrained.run.folder), serve="base")
    config = GenerateConfig(temperature=0.7, max_tokens=2)

    async def ask():
        return await api.generate([ChatMessageUser(content="2 plus 2?")], [], "auto", config)

    first, second = anyio.run(ask), anyio.run(ask)
    assert first.completion == second.completion
    assert [r.message for r in caplog.records if "temperature is not heeded" in r.message] == [
        f"{untrained.run.folder}: temperature is not heeded; every answer is the model's greedy one"
    ]


def test_texts_in_parts_are_joined_and_pictures_refused():
    parts = [ContentText(text="2 plus "), ContentText(text="2?")]
    conversation, spans = messages.as_conversation([ChatMessageUser(content=parts)])
    assert conversation == [{"role": "user", "content": ChatMessageUser(content=parts).text}]
    assert spans == []
    picture = ChatMessageUser(content=[ContentImage(image="data:image/png;base64,aGk=")])
    with pytest.raises(InputError, match="content of type 'image' cannot be carried"):
        messages.as_conversation([picture])
    with pytest.raises(InputError, match="role 'tool' cannot be carried"):
        messages.as_conversation([ChatMessageTool(content="4")])


def test_requests_that_wait_are_answered_together_and_an_error_reaches_each():
    batches: list[list[int]] = []

    def double(items):
        batches.append(list(items))
        if 7 in items:
            raise ValueError("seven")
        return [2 * item for item in items]

    async def ask(together: Batches, numbers) -> dict:
        results = {}

        async def one(number):
            try:
                results[number] = await together.answer(number)
            except ValueError as error:
                results[number] = str(error)

        async with anyio.create_task_group() as group:
            for number in numbers:
                group.start_soon(one, number)
        return results

    together = Batches(double, 4)
    assert anyio.run(ask, together, range(1, 7)) == {n: 2 * n for n in range(1, 7)}
    assert [len(batch) for batch in batches] == [4, 2]
    assert anyio.run(ask, together, [7, 8]) == {7: "seven", 8: "seven"}
    assert anyio.run(ask, together, [9]) == {9: 18}


def test_a_cancelled_request_leaves_the_others_their_answers():
    async def ask() -> int:
        together = Batches(lambda items: [2 * item for item in items], 2)
        async with anyio.create_task_group() as group:
            with anyio.move_on_after(0):
                await together.answer(1)
            group.start_soon(together.answer, 3)
            return await together.answer(2)

    assert anyio.run(ask) == 4
