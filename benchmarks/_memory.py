"""One measurement of memory in a process of its own: `python _memory.py capture|hidden_states [--small]`.

Prints the peak size in MB above what the loaded model takes: resident, or allocated where there is a GPU. The
model is a random Llama of 8 layers of 512; 16 prompts of 512 tokens.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from safetynet.detection.capture import read
from safetynet.detection.features import FeatureSpec
from safetynet.detection.readers import Reader
from safetynet.engine.batch import Batch
from safetynet.engine.trace import forward
from safetynet.run.directory import peak_memory_mb


def main() -> None:
    """Make the model, note the memory, read the batch one way, print the difference."""
    small = "--small" in sys.argv
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=2 if small else 8,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    model = LlamaForCausalLM(config).eval()
    rows, width = (2, 64) if small else (16, 512)
    ids = torch.randint(0, 512, (rows, width))
    batch, user = Batch(ids, torch.ones_like(ids)), torch.ones(rows, width)
    before = peak_mb()
    with torch.no_grad():
        WAYS[sys.argv[1]](model, batch, user)
    print(peak_mb() - before)


def peak_mb() -> float:
    """Of the GPU's allocator where there is one, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_memory_mb()


def by_capture(model: LlamaForCausalLM, batch: Batch, user: torch.Tensor) -> None:
    """Reduced inside the hooks."""
    with Reader(model, FeatureSpec()) as reader:
        read(model, reader, batch, user)


def by_hidden_states(model: LlamaForCausalLM, batch: Batch, user: torch.Tensor) -> None:
    """All states of all layers, then the same reduction."""
    output = forward(model, batch, use_cache=False, output_hidden_states=True)
    for layer in output.hidden_states[1:]:
        layer[:, -1].clone()
        torch.einsum("bt,btd->bd", user, layer.float()) / user.sum(1, keepdim=True)


WAYS = {"capture": by_capture, "hidden_states": by_hidden_states}


if __name__ == "__main__":
    main()
