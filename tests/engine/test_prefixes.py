"""What goes on from a prompt has the numbers of a whole pass, and computes what is new alone."""

import pytest
import torch
from tests.models import architectures

from safetynet.engine.batch import Batch
from safetynet.engine.prefixes import Prefixes, Version
from safetynet.engine.trace import forward


@pytest.mark.parametrize("name", ["qwen", "gemma3", "mixtral", "jamba"])
def test_versions_go_on_from_their_prompts(build, name):
    # Of every other layer of Jamba the cache holds a state, which is no token's.
    model = architectures.build(name) if name == "jamba" else build(name)
    torch.manual_seed(0)
    prompts = [torch.randint(3, 97, (length,)).tolist() for length in (14, 9, 20)]
    versions = [
        Version.of(ids[:at] + ids[at + 2 :], row, ids)
        for row, ids in enumerate(prompts)
        for at in (0, len(ids) // 2, len(ids) - 3, len(ids) - 2)
    ]
    assert [version.new for version in versions[:4]] == [12, 5, 1, 1]
    columns = []
    with torch.no_grad():
        whole = [forward(model, Batch.of([version.ids])).logits[0, -1] for version in versions]
        prefixes = Prefixes.read(model, Batch.of(prompts), range(3))
        embedding = model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda *args: columns.append(args[2].shape[1]))
        for some in ([1, 5, 9], [2, 7, 11], [0, 4, 10]):
            logits = prefixes.next_logits([versions[i] for i in some], 0)
            torch.testing.assert_close(logits, torch.stack([whole[i] for i in some]), atol=1e-4, rtol=1e-4)
    hook.remove()
    assert columns == ([18, 18, 18] if name == "jamba" else [8, 1, 12])
