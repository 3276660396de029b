from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from safetynet.errors import InputError
from safetynet.training.examples import Order, encode, packed, padded


def test_labels_are_the_answer_and_its_end_token(rows, serialiser):
    example = encode(rows, serialiser, 128)[0]
    supervised = [label for label in example.labels if label != -100]
    assert len(supervised) == example.supervised
    assert serialiser.decode(supervised) == rows.answer[0]
    assert supervised[-1] in serialiser.stop_ids


def test_rows_read_from_parquet_encode_alike(rows, serialiser, tmp_path):
    rows.to_parquet(tmp_path / "rows.parquet")
    assert encode(pd.read_parquet(tmp_path / "rows.parquet"), serialiser, 128) == encode(
        rows, serialiser, 128
    )


def test_a_row_that_cannot_be_serialised_is_named(rows, serialiser):
    broken = rows.copy()
    broken.at[5, "messages"] = [{"role": "assistant", "content": "Hello."}]
    with pytest.raises(InputError, match=r"^row 5: A prompt must end with a message of role user"):
        encode(broken, serialiser, 128)


def test_no_rows_are_refused(rows, serialiser):
    with pytest.raises(InputError, match=r"no row to train on"):
        encode(rows[:0], serialiser, 128)


def test_answers_that_are_cut_are_counted(rows, serialiser, caplog):
    long = rows[:3].copy()
    long["answer"] = ["yes", "word " * 200, "word " * 200]
    encode(long, serialiser, 128)
    assert "2 of 3 answers are longer than training.max_length 128" in caplog.text


def test_prompts_that_are_cut_are_counted_with_what_they_lost(rows, serialiser, caplog):
    long = rows[:3].copy()
    question = {"role": "user", "content": "word " * 200}
    turns = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "yes"}]
    long["messages"] = [rows["messages"][0], [question], [*turns, {"role": "user", "content": "And now?"}]]
    encode(long, serialiser, 100)
    expected = "2 of 3 prompts are longer than training.max_length allows and were cut "
    assert f"{expected}(1 lost earlier turns, 1 lost the end of the last message)" in caplog.text
    caplog.clear()
    encode(rows, serialiser, 512)
    assert not caplog.text


@pytest.mark.parametrize("grouped", [True, False])
def test_each_epoch_sees_every_row_once_in_an_order_of_its_own(grouped):
    order = Order(list(np.random.default_rng(0).integers(5, 90, 50)), 8, grouped, seed=1)
    epochs = []
    for epoch in (0, 1):
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert sorted(i for step in epochs[-1] for i in step) == list(range(50))
        assert len(epochs[-1]) == len(order) == 7
    assert epochs[0] != epochs[1]
    order.set_epoch(0)
    assert list(order) == epochs[0]


def test_grouping_puts_rows_of_similar_length_together():
    lengths = list(np.random.default_rng(0).integers(5, 90, 400))

    def padding(grouped: bool) -> int:
        return sum(
            len(step) * max(lengths[i] for i in step) - sum(lengths[i] for i in step)
            for step in Order(lengths, 8, grouped, seed=0)
        )

    assert padding(True) < padding(False) / 5


def test_grouped_steps_do_not_come_by_length():
    lengths = np.random.default_rng(0).integers(5, 90, 2000)
    means = [lengths[step].mean() for step in Order(list(lengths), 8, True, seed=0)]
    shorter = np.mean(np.diff(means) < 0)
    assert 0.35 < shorter < 0.65


def test_padded_rows_stand_on_the_left_of_their_line(examples):
    batch = padded(examples[:5], pad_id=7)
    for line, example in enumerate(examples[:5]):
        n = len(example.input_ids)
        assert batch["input_ids"][line].tolist()[:n] == example.input_ids
        assert set(batch["input_ids"][line, n:].tolist()) <= {7}
        assert batch["attention_mask"][line].sum() == n
        assert (batch["labels"][line, n:] == -100).all()


def test_packed_lines_hold_every_row_once_and_little_else(examples):
    batch = packed(examples, pad_id=7)
    found = []
    for ids, labels, mask, positions in zip(
        *(batch[name] for name in ("input_ids", "labels", "attention_mask", "position_ids")), strict=True
    ):
        real = int(mask.sum())
        starts = [i for i in range(real) if positions[i] == 0] + [real]
        found += [(ids[a:b].tolist(), labels[a:b].tolist()) for a, b in pairwise(starts)]
        assert positions[real:].tolist() == list(range(len(ids) - real))
    assert sorted(found) == sorted((e.input_ids, e.labels) for e in examples)
    assert batch["input_ids"].shape[1] == max(len(e.input_ids) for e in examples)
    assert batch["attention_mask"].float().mean() > 0.9
