"""Does vLLM read from an adapter's files what SafetyNet has trained?

    pip download vllm==0.33.0 --no-deps --no-binary vllm    # or its source from anywhere; unpack it
    python benchmarks/vllm_files.py --source vllm-0.33.0
    python benchmarks/vllm_files.py --smoke                 the adapters alone, read by SafetyNet

An adapter as training attaches it, with random factors, is saved for the miniature of each family. vLLM's own
reader (`vllm/lora/peft_helper.py`, `lora_model.py`) reads the folders, without vLLM's engine, which needs a
GPU or a build of its own: what these files import of the rest of vLLM is stood in for by empty names, none of
which the reader calls. Compared are the modules that have an update, and each update with its scale, those of
fused experts taken apart as vLLM's manager does. The exit code is 1 where one is missing or differs by more
than rounding. Whether vLLM's model has a module of that name is not asked.
"""

import argparse
import logging
import sys
import tempfile
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
from _running import ROOT, markdown

from safetynet import recipe
from safetynet.models import loading
from safetynet.models.lora import adapted_modules, update_of
from safetynet.training import adapters

FAMILIES = ("llama2", "llama3", "qwen", "gemma", "mixtral")
READER = ("vllm.lora.lora_model", "vllm.lora.lora_weights", "vllm.lora.peft_helper", "vllm.lora.utils")
TOLERANCE = 1e-5


def main() -> None:
    """Save, read both ways, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, help="vLLM's unpacked source, the folder that holds vllm/")
    parser.add_argument("--smoke", action="store_true", help="one family, without vLLM")
    args = parser.parse_args()
    if args.source is None and not args.smoke:
        parser.error("name vLLM's source, or --smoke")
    if args.source is not None:
        sys.meta_path.insert(0, Reader(args.source))
    with tempfile.TemporaryDirectory() as folder:
        families = FAMILIES[:1] if args.smoke else FAMILIES
        lines = [compared(family, Path(folder) / family, args.source is not None) for family in families]
    print(markdown(pd.DataFrame(lines)))
    sys.exit(any(line["missing"] or line["difference"] > TOLERANCE for line in lines))


def compared(family: str, folder: Path, by_vllm: bool) -> dict[str, Any]:
    """An adapter of a family's miniature: modules that have an update, and the largest difference of one."""
    plan = recipe.load(ROOT / "recipes" / f"{family}-miniature.yaml")
    loaded = loading.load(plan.model)
    model: Any = adapters.attach(loaded.model, plan.training, loaded.family, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    ours = {
        name.removeprefix("base_model.model."): update_of(module, "default").product()
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    assert len(ours) == sum(1 for _ in adapted_modules(model))
    theirs = read_by_vllm(folder) if by_vllm else ours
    shared = ours.keys() & theirs.keys()
    differences = [float((theirs[name] - ours[name]).norm() / ours[name].norm()) for name in shared]
    return {
        "family": family,
        "modules": len(ours),
        "missing": len(ours.keys() ^ theirs.keys()),
        "difference": max(differences, default=0.0),
    }


def read_by_vllm(folder: Path) -> dict[str, torch.Tensor]:
    """The updates that vLLM's reader makes of an adapter's folder, by module."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=None)
    assert not helper._validate_features()
    targets = {name.rpartition(".")[2] for name in helper.target_modules} | {"experts"}
    loras = LoRAModel.from_local_checkpoint(
        str(folder), targets, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    ).loras
    updates = {}
    for name, lora in loras.items():
        # As its manager takes experts apart, in models that hold them in one tensor; one expert is none.
        experts = len(lora.lora_a) // lora.rank
        down = lora.lora_a.reshape(experts, -1, lora.lora_a.shape[-1])
        up = lora.lora_b.reshape(len(lora.lora_b), -1, experts).permute(2, 0, 1)
        updates[name] = lora.scaling * up @ down
    return updates


class Reader(MetaPathFinder, Loader):
    """Imports vLLM's reader from its source, and empty names for all else of vLLM."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Of vLLM alone."""
        if name.partition(".")[0] != "vllm" or name in READER:
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module all of whose names are classes without content."""
        module = Empty(spec.name)
        module.__path__ = [str(self.source.joinpath(*spec.name.split(".")))]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs."""


class Empty(ModuleType):
    """What is imported from it is a class, a logger, or False."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "init_logger":
            return logging.getLogger
        return False if name.isupper() else type(name, (), {})


if __name__ == "__main__":
    main()
