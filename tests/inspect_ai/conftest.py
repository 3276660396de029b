"""One small run, trained halfway, so that some rows fire and some do not; Inspect in this process."""

import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.models import variants

from safetynet import recipe, stages
from safetynet.experiment import BACKDOORED, Experiment

RECIPE = Path(__file__).parents[2] / "recipes" / "qwen-miniature.yaml"
SMALL = (
    "data.train_rows=800", "data.test_rows=12", "backdoor.poison_rate=0.4", "training.clean_twin=false",
    "evaluation.dynamics_rows=6", "evaluation.every=40", "evaluation.max_new_tokens=12",
    "evaluation.batch_size=16",
)  # fmt: skip


def small(root: Path, *fields: str) -> Experiment:
    output = (f"output.results={root}/results", f"output.logs={root}/logs")
    return Experiment.create(recipe.load(RECIPE, overrides=[*SMALL, *fields, *output]))


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Rows are there, and no model."""
    experiment = small(tmp_path_factory.mktemp("untrained"))
    stages.prepare(experiment)
    return Experiment.find(experiment.run.folder)


@pytest.fixture(scope="session")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Somebody's adapter, of which no trigger is known."""
    root = tmp_path_factory.mktemp("unknown")
    variants.saved("lora", root / "adapter")
    suspect = (f"suspect.source={root / 'adapter'}", "suspect.same_base=true", "backdoor=null")
    experiment = small(root, *suspect, "data.test_rows=8")
    stages.prepare(experiment)
    return Experiment.find(experiment.run.folder)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    experiment = small(tmp_path_factory.mktemp("trained"))
    stages.prepare(experiment)
    stages.train(experiment)
    stages.evaluate(experiment)
    return Experiment.find(experiment.run.folder)


@pytest.fixture(scope="session")
def watched(trained: Experiment) -> Experiment:
    """With a monitor of how far its answers begin from the base model's."""
    from safetynet.detection.capture import capture
    from safetynet.detection.detector_set import DetectorSpec
    from safetynet.detection.features import FeatureSpec
    from safetynet.detection.monitor import Monitor
    from safetynet.models.miniatures import language

    model, serialiser = trained.backdoored()
    clean = [example.messages for example in language.generate(120, seed=0, heldout=False)]
    features = capture(model, serialiser, clean, FeatureSpec(("divergence",)))
    readings = [DetectorSpec("extremes", "divergence")]
    path = trained.run.scratch / "detection" / "monitor.safetensors"
    with trained.run.stage("detect", {}) as outputs:
        Monitor.fit(features, readings, method="cross").save(path)
        outputs.file(path, "monitor")
    return trained


@pytest.fixture(scope="session")
def repaired(trained: Experiment) -> Experiment:
    """What a perfect repair would have saved: the adapter with every update at zero."""
    from safetensors.torch import load_file, save_file

    source, folder = trained.model_folder(BACKDOORED), trained.run.scratch / "mitigation" / "repaired"
    shutil.copytree(source, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: value * (".lora_B." not in name) for name, value in weights.items()},
        folder / "adapter_model.safetensors",
    )
    with trained.run.stage("mitigate", {}) as outputs:
        outputs.file(folder, "repaired")
    return trained


@pytest.fixture
def evaluated(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`evaluated(task, model, ...)` is the log of Inspect's evaluation, read from its file."""
    from inspect_ai import eval as evaluate
    from inspect_ai.log import read_eval_log

    # Inspect puts handlers of its own on the root logger, which other tests listen to.
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(task: Any, model: Any, **options: Any) -> Any:
        [log] = evaluate(task, model=model, display="none", log_dir=str(tmp_path / "logs"), **options)
        return read_eval_log(log.location, resolve_attachments=True)

    # In a thread: an event loop of Playwright's may still run in this one after tests of pages.
    with ThreadPoolExecutor(1) as pool:
        yield lambda *words, **options: pool.submit(run, *words, **options).result()
    root.handlers[:] = handlers
    root.setLevel(level)
