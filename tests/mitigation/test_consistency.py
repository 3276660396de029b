"""CROW's regulariser: what padding must not change."""

import torch

from safetynet.mitigation.consistency import inconsistency, objective
from safetynet.mitigation.fine_tuning import answer_loss, encode
from safetynet.training.examples import padded


def embedded(subject, rows):
    batch = padded(rows, subject.serialiser.pad_id)
    return subject.model.get_input_embeddings()(batch["input_ids"]).detach(), batch["attention_mask"]


def test_a_padded_batch_equals_its_rows_alone(planted):
    rows = sorted(encode(planted.clean, planted), key=lambda e: len(e.input_ids))
    rows = [rows[0], rows[-1]]
    assert len(rows[0].input_ids) < len(rows[1].input_ids)
    with torch.no_grad():
        together = inconsistency(planted.model, *embedded(planted, rows))
        alone = [inconsistency(planted.model, *embedded(planted, [row])) for row in rows]
    lengths = [len(row.input_ids) for row in rows]
    mean = sum(n * a for n, a in zip(lengths, alone, strict=True)) / sum(lengths)
    assert torch.allclose(together, mean, rtol=1e-5)


def test_the_push_makes_layers_less_consistent(planted):
    rows = encode(planted.clean, planted)[:8]
    batch = padded(rows, planted.serialiser.pad_id)
    plain = answer_loss(planted.model, batch)
    weak, strong = (objective(planted.model, batch, alpha=1.0, epsilon=e) - plain for e in (0.0, 0.3))
    assert strong > weak > 0


def test_the_inconsistency_is_the_mean_over_tokens_and_inner_layers(planted):
    embeddings, mask = embedded(planted, encode(planted.clean, planted)[:1])
    with torch.no_grad():
        states = planted.model(
            inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True
        ).hidden_states
        found = inconsistency(planted.model, embeddings, mask)
    turns = []
    for layer in range(1, len(states) - 2):
        for a, b in zip(states[layer][0], states[layer + 1][0], strict=True):
            turns.append(1 - float(a @ b / (a.norm() * b.norm())))
    assert abs(float(found) - sum(turns) / len(turns)) < 1e-5
