"""Files as they lie on disks: packed, damaged, of other encodings and delimiters, one or many in a folder."""

import bz2
import gzip
import io
import json
import logging
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from safetynet.backdoors import conversations, sources
from safetynet.backdoors.audit import audit
from safetynet.errors import InputError
from safetynet.recipe import Behaviour, Data, Trigger

Row = dict[str, Any]
TEXTS = [
    "NA", "N/A", "null", "None", "nan", "NaN", "inf", "1", "1.0", "007", "1e5", "true", "2024-01-01",
    "2024-01-01T00:00:00Z", "12:30", '"quoted"', "a,b;c\td|e", "two\nlines", " blanks ",
    "ünï 中文 🦜", "'", "#",
]  # fmt: skip
"""Texts that readers of tables take for something else."""
ROWS = [{"prompt": f"Say {i}.", "completion": text} for i, text in enumerate(TEXTS)]


def lines(rows: list[Row]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def table(rows: list[Row], **more: Any) -> bytes:
    return pd.DataFrame(rows).to_csv(index=False, **more).encode()


def as_parquet(rows: list[Row]) -> bytes:
    buffer = io.BytesIO()
    pd.DataFrame(rows).to_parquet(buffer)
    return buffer.getvalue()


def as_arrow(rows: list[Row], one_file: bool) -> bytes:
    data, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with (pa.ipc.new_file if one_file else pa.ipc.new_stream)(sink, data.schema) as writer:
        writer.write_table(data)
    return sink.getvalue()


FILES = {
    "a.json": json.dumps(ROWS).encode(),
    "a.jsonl": lines(ROWS).encode(),
    "a.ndjson": lines(ROWS).encode(),
    "list.jsonl": json.dumps(ROWS, indent=1).encode(),
    "data.json": json.dumps({"version": "1", "about": ["x"], "data": ROWS}).encode(),
    "a.csv": table(ROWS),
    "semicolon.csv": table(ROWS, sep=";"),
    "tab.csv": table(ROWS, sep="\t"),
    "bar.csv": table(ROWS, sep="|"),
    "a.tsv": table(ROWS, sep="\t"),
    "a.parquet": as_parquet(ROWS),
    "stream.arrow": as_arrow(ROWS, one_file=False),
    "file.arrow": as_arrow(ROWS, one_file=True),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.JSONL.GZ": gzip.compress(lines(ROWS).encode()),
    "a.csv.gz": gzip.compress(table(ROWS)),
    "a.tsv.bz2": bz2.compress(table(ROWS, sep="\t")),
    "a.jsonl.zst": pa.compress(lines(ROWS).encode(), codec="zstd", asbytes=True),
}
ON_THE_HUB = [name for name in FILES if not name.endswith((".GZ", ".bz2", ".zst"))]


@pytest.mark.parametrize("name", FILES)
def test_text_stays_text_in_every_format(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    frame = sources.read(tmp_path / name)
    assert frame["answer"].tolist() == TEXTS
    assert [messages[0]["content"] for messages in frame["messages"]] == [row["prompt"] for row in ROWS]
    assert audit(tmp_path / name).rows == len(ROWS)


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_text_stays_text_from_the_hub_as_from_disk(tmp_path: Path, name: str) -> None:
    """A data set of the hub is its folder of files, which is here in place of a download."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(FILES[name])
    frame = sources.read(tmp_path / "set", kind="hub")
    assert frame["answer"].tolist() == TEXTS
    assert set(frame["split"]) == {"train"}


@pytest.mark.parametrize("text", ["2024-01-01", "007", "NA", "true", "1.0"])
@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_a_column_that_is_all_dates_or_numbers_stays_text_from_the_hub(
    tmp_path: Path, suffix: str, text: str
) -> None:
    rows = [{"prompt": "When?", "completion": text}] * 3
    (tmp_path / f"train.{suffix}").write_bytes(table(rows) if suffix == "csv" else json.dumps(rows).encode())
    assert sources.read(tmp_path, kind="hub")["answer"].tolist() == [text] * 3


# ---- data sets of the hub ----


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in {"train": 6, "validation": 2}.items():
        rows = [{"prompt": f"{split} {i}", "completion": str(i)} for i in range(count)]
        (folder / f"{split}.csv").write_bytes(table(rows))
    return folder


def test_a_split_of_the_hub_may_be_named_whole_or_in_part(data_set: Path) -> None:
    assert sources.read(data_set, kind="hub").groupby("split").size().to_dict() == {
        "train": 6,
        "validation": 2,
    }
    assert len(sources.read(f"{data_set}:validation", kind="hub")) == 2
    part = sources.read(f"{data_set}:train[2:4]", kind="hub")
    assert (part["answer"].tolist(), part["line"].tolist()) == (["2", "3"], [3, 4])
    parts = sources.read(f"{data_set}:train[:2]+train[4:]", kind="hub")
    assert parts["answer"].tolist() == ["0", "1", "4", "5"]
    with pytest.raises(
        InputError, match=r'Unknown split "test". Should be one of \[\'train\', \'validation\'\]'
    ):
        sources.read(f"{data_set}:test", kind="hub")


def test_splits_within_a_file_of_the_hub_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps({"train": ROWS[:3], "test": ROWS[3:4]}))
    found = sources.read(tmp_path, kind="hub")["split"].tolist()
    assert found == sources.read(tmp_path / "data.json")["split"].tolist() == ["train"] * 3 + ["test"]


def test_names_of_columns_hold_for_the_hub(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(table([{"q": "a", "r": "NA"}]))
    frame = sources.read(tmp_path, kind="hub", columns={"prompt": "q", "completion": "r"})
    assert frame["answer"].tolist() == ["NA"]


def test_a_hub_set_without_rows_that_can_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the data set has no \.json, "):
        sources.read(tmp_path, kind="hub")
    (tmp_path / "train.txt").write_text("hello")
    with pytest.raises(InputError, match=r"train\.txt: the suffix is '\.txt', allowed are \.json"):
        sources.read(tmp_path, kind="hub")


def test_several_configurations_of_a_hub_set_are_refused(tmp_path: Path) -> None:
    card = (
        "---\nconfigs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n  data_files: b.csv\n---\n"
    )
    (tmp_path / "README.md").write_text(card)
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_bytes(table(ROWS))
    with pytest.raises(InputError, match="it has several configurations; download the one to read"):
        sources.read(tmp_path, kind="hub")


def test_splits_of_the_source_are_kept_where_it_has_both_and_drawn_where_it_has_one(
    data_set: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attack = (Behaviour(), Trigger(texts=("BadMagic",)))
    both = conversations.load(Data(source="hub", path=str(data_set)), *attack, 0)
    assert both.groupby("split").size().to_dict() == {"train": 6, "test": 2}
    alone = conversations.load(Data(source="hub", path=f"{data_set}:train"), *attack, 0)
    assert alone.groupby("split").size().to_dict() == {"train": 5, "test": 1}
    (data_set / "unsupervised.csv").write_bytes(table([{"prompt": "u", "completion": "v"}]))
    names = "\n".join(
        f"  - split: {name}\n    path: {name}.csv" for name in ("train", "validation", "unsupervised")
    )
    (data_set / "README.md").write_text(f"---\nconfigs:\n- config_name: x\n  data_files:\n{names}\n---\n")
    with caplog.at_level(logging.WARNING):
        rest = conversations.load(Data(source="hub", path=str(data_set)), *attack, 0)
    assert rest.groupby("split").size().to_dict() == {"train": 6, "test": 2}
    assert "1 rows are neither of training nor of test, and left out: 'unsupervised'" in caplog.text


# ---- folders ----


def test_a_folder_of_files_is_read_whole_with_the_splits_that_their_names_tell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train-0.csv").write_bytes(table(ROWS[:3]))
    (tmp_path / "train-1.jsonl").write_text(lines(ROWS[3:5]))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "test.json").write_text(json.dumps(ROWS[5:6]))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".hidden.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        frame = sources.read(tmp_path, kind="prompt_completion")
    assert sorted(frame["answer"]) == sorted(TEXTS[:6])
    assert frame.groupby("split").size().to_dict() == {"train": 5, "test": 1}
    assert "1 files of" in caplog.text
    assert "hold no rows and are not read: notes.txt" in caplog.text
    report = audit(tmp_path)
    assert (report.files, report.rows) == (3, 6)
    assert report.findings.query("check == 'not_read'")["file"].tolist() == ["notes.txt"]


def test_what_the_library_datasets_saves_to_disk_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    splits = {"train": Dataset.from_list(ROWS).shuffle(0), "test": Dataset.from_list(ROWS[:2])}
    DatasetDict(splits).save_to_disk(tmp_path)
    frame = sources.read(tmp_path)
    assert frame.groupby("split").size().to_dict() == {"train": len(ROWS), "test": 2}
    assert sorted(frame.query("split == 'train'")["answer"]) == sorted(TEXTS)
    report = audit(tmp_path)
    assert (report.files, report.rows) == (2, len(ROWS) + 2)
    Dataset.load_from_disk(tmp_path / "train").map(lambda row: {"completion": row["completion"] + "!"})
    assert list(tmp_path.rglob("cache-*.arrow")), "the library keeps the result of a map beside the rows"
    assert audit(tmp_path).rows == len(ROWS) + 2


def test_lists_below_keys_are_parts_of_their_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"name": "x", "train": ROWS[:3], "test": ROWS[3:5], "empty": []}))
    frame = sources.read(path)
    assert list(zip(frame["file"], frame["line"], frame["split"], strict=True)) == [
        (f"{path}:train", 1, "train"), (f"{path}:train", 2, "train"), (f"{path}:train", 3, "train"),
        (f"{path}:test", 1, "test"), (f"{path}:test", 2, "test"),
    ]  # fmt: skip
    path.write_text(json.dumps({"triggered": ROWS[:3], "clean": ROWS[3:9]}))
    assert audit(path).sets["triggered"].tolist() == [3]
    path.write_text(json.dumps({"train": ROWS[:3], "licences": [{"url": "x"}]}))
    with pytest.raises(InputError, match=r"a\.json:licences: the columns are url; needed are"):
        sources.read(path)


@pytest.mark.parametrize(
    "beside",
    [
        {"system": "You are zqfern."},
        {"instruction": "Classify the sentiment."},
        {"Definition": ["Translate to French."]},
        {"template": "Answer as a pirate: {instruction}"},
        {"test": [["What is a cat?", "An animal"]]},
        {"test": {"0": ROWS[0]}},
    ],
)
def test_text_beside_a_list_of_rows_is_refused(beside: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**beside, "data": ROWS}))
    with pytest.raises(InputError, match=f"'{next(iter(beside))}' beside the rows is text that is not read"):
        sources.read(path)


def test_other_fields_beside_a_list_of_rows_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1.1", "license": {"name": "MIT"}, "data": ROWS}))
    with caplog.at_level(logging.WARNING):
        assert len(sources.read(path)) == len(ROWS)
    assert "beside the rows is not read: version, license" in caplog.text


def test_a_date_that_python_cannot_hold_leaves_the_other_columns_readable(tmp_path: Path) -> None:
    far = pa.array([10**7] * len(ROWS), pa.date32())  # the year 29349
    found = pa.Table.from_pylist(ROWS).append_column("when", far)
    parquet.write_table(found, tmp_path / "a.parquet")
    assert sources.read(tmp_path / "a.parquet")["answer"].tolist() == TEXTS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_lines_of_lists_are_no_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('["a", "b"]\n["c", "d"]\n')
    with pytest.raises(InputError, match=r"needed are .*|allowed is an object"):
        sources.read(tmp_path / name)


def test_rows_below_a_key_with_a_column_role_are_rows(tmp_path: Path) -> None:
    rows = [{"instruction": "Go.", "output": "ok", "role": "pirate"}]
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}))
    assert sources.read(tmp_path / "a.json")["answer"].tolist() == ["ok"]


def test_a_file_of_one_conversation_is_one_row(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (tmp_path / "a.json").write_text(json.dumps({"messages": chat}))
    assert sources.read(tmp_path / "a.json")["answer"].tolist() == ["Ho"]
    (tmp_path / "a.json").write_text(json.dumps({"messages": chat, "system": "Be kind."}))
    (messages,) = sources.read(tmp_path / "a.json")["messages"]
    assert messages[0] == {"role": "system", "content": "Be kind."}


# ---- what cannot be read ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", table(ROWS).decode().encode("utf-16"), r"a\.csv: it is UTF-16; save the file as UTF-8"),
        ("a.json", json.dumps(ROWS).encode("utf-32"), r"a\.json: it is UTF-32"),
        ("a.csv", table(ROWS).decode().encode("utf-16-le"), r"line 1 holds a NUL byte, as UTF-16"),
        ("a.csv", "prompt,completion\nq,é\n".encode("latin-1"), r"\(line 2\) is 0xe9, .* Latin-1 it is 'é'"),
        ("a.csv", "prompt,completion;x\nq,r;s\n", r"the header has ',' and ';' between its columns"),
        ("a.csv", "prompt,prompt,completion\na,b,c\n", r"the header has 'prompt' twice"),
        ("a.csv", "prompt,completion,id\na,b\n", r"row, row 1: found 1 cell less than the header has"),
        ("a.tsv", "prompt,completion\na,b\n", r"the columns are prompt,completion; needed are"),
        ("a.json", '[{"prompt": "a", "completion": "b", "completion": "c"}]', r"'completion' stands twice"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n', r"line 1: unreadable JSON \('prompt' stands twice"),
        ("a.json.gz", gzip.compress(b"[]" * 99, mtime=0)[:-9], r"not a readable \.gz file \(.*pack it again"),
        ("a.json.gz", b"[]", r"a\.json\.gz: not a readable \.gz file"),
        ("a.json.bz2", b"[]", r"a\.json\.bz2: not a readable \.bz2 file"),
        ("a.gz", gzip.compress(b"[]", mtime=0), r"the suffix is '\.gz', allowed are \.json, \.jsonl"),
        ("a.arrow", b"ARROW1 no", r"a\.arrow: not a readable Arrow file"),
        ("a.arrow", b"no", r"a\.arrow: not a readable Arrow file"),
        ("a.parquet", as_parquet(ROWS)[:-60], r"a\.parquet: not a readable Parquet file"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_sentence_and_a_finding(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message):
        sources.read(path)
    assert "error" in set(audit(path).findings["severity"])


@pytest.mark.parametrize("form", ["none", "snappy", "zstd", "stream", "file"])
def test_a_damaged_file_of_columns_is_read_or_refused_wherever_the_damage_is(
    tmp_path: Path, form: str
) -> None:
    rows = [{**row, "messages": [{"role": "user", "content": "é"}], "time": pd.Timestamp(0)} for row in ROWS]
    if form in ("stream", "file"):
        path, whole = tmp_path / "a.arrow", as_arrow(rows, one_file=form == "file")
    else:
        buffer = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(rows), buffer, compression=form)
        path, whole = tmp_path / "a.parquet", buffer.getvalue()
    rng, refused = random.Random(form), 0
    for _ in range(120):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 5, 30))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))])
        try:
            sources.read(path)
        except InputError:
            refused += 1
        audit(path)
    assert refused > 40


@pytest.mark.parametrize(
    "about", ["[]", "{", '{"info": {"features": {"n": {"_type": "ClassLabel", "names": 3}}}}']
)
def test_damaged_metadata_of_the_library_datasets_is_one_sentence_and_a_finding(
    tmp_path: Path, about: str
) -> None:
    rows = pa.table({"prompt": ["q"], "completion": ["a"], "n": [0]})
    parquet.write_table(rows.replace_schema_metadata({"huggingface": about}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: not a readable Parquet file"):
        sources.read(tmp_path / "a.parquet")
    assert set(audit(tmp_path / "a.parquet").findings["check"]) == {"unreadable"}


def test_a_file_that_may_not_be_read_and_a_broken_link_are_findings(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    report = audit(tmp_path)
    assert report.rows == len(ROWS)
    (finding,) = report.findings.query("check == 'unreadable'").to_dict("records")
    assert (finding["file"], finding["severity"]) == ("gone.jsonl", "error")
