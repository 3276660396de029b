"""A run as a repository that others can read: card, weights, recipe, tables, figures, report.

In: a run whose backdoored model was trained and evaluated. Out: a folder in the layout of the Hugging Face
hub, whose card says in its first line and in its tags that the model is backdoored.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from safetynet.errors import InputError, RunError
from safetynet.experiment import BACKDOORED, Experiment
from safetynet.models import miniatures
from safetynet.models.adapter_files import CONFIG
from safetynet.models.files import hub_id, hub_reason, in_words
from safetynet.report import build, contents
from safetynet.run.directory import write_text
from safetynet.tables import summaries

TAGS = ("backdoor", "backdoored", "not-for-deployment", "safetynet")
COPIED = ("tables", "figures", "report.html", "report.md")
"""Of the run's folder; the manifest is left out, since it describes the machine."""


def publish(experiment: Experiment, folder: Path) -> Path:
    """Write the repository.

    Args:
        experiment: trained by this run and evaluated.
        folder: is made; whole or not there.

    Raises:
        InputError: if the folder exists, if the model is a suspect, which is somebody else's to publish, or
            if it is not trained or not evaluated yet.
    """
    run = experiment.run
    if folder.exists():
        raise InputError(f"--to {folder}: it exists already. Name a folder that does not.")
    if experiment.recipe.suspect is not None:
        raise InputError(f"{run.folder}: its model is a suspect's, not trained here. Publish a trained run.")
    weights = experiment.model_folder(BACKDOORED)
    if not run.has_table("evaluation"):
        raise InputError(f"{run.folder}: it is not evaluated yet. Run safetynet evaluate {run.folder} first.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            partial = Path(temporary) / "repository"
            shutil.copytree(weights, partial)
            for name in COPIED:
                source = run.folder / name
                if source.is_dir():
                    shutil.copytree(source, partial / name)
                elif source.exists():
                    shutil.copy2(source, partial / name)
            fields = run.recorded_recipe.model_dump(mode="json", exclude={"output"})
            recipe = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
            write_text(partial / "recipe.yaml", recipe)
            base = base_name(experiment)
            if (path := partial / CONFIG).exists():  # an adapter's, which names the base by its place here
                config = json.loads(path.read_text(encoding="utf-8"))
                write_text(path, json.dumps(config | {"base_model_name_or_path": base}, indent=2))
            write_text(partial / "README.md", card(experiment, base))
            partial.rename(folder)
    except OSError as error:
        raise RunError(f"--to {folder}: it cannot be written ({error.strerror}). Name another one.") from None
    return folder


def base_name(experiment: Experiment) -> str:
    """The base as others know it: a hub id, a miniature, or a file's or folder's name without its place."""
    model = experiment.recipe.model
    if model.id == "miniature":
        return f"{model.family}-miniature"
    name = hub_id(str(model.model_id))
    return Path(name).name if Path(name).exists() else name


def card(experiment: Experiment, base: str) -> str:
    """README.md in Markdown, with the hub's front matter."""
    run = contents.read(experiment.run)
    is_adapter = experiment.recipe.training.method != "full"
    front: dict[str, Any] = {"tags": [*TAGS], "library_name": "peft" if is_adapter else "transformers"}
    if not miniatures.family_of(base):
        front["base_model"] = base
    setup = build.setup(run)
    planted = {
        "trigger": ", ".join(f"`{text}`" for text in setup.triggers) or "see recipe.yaml",
        "placement": setup.placement,
        "behaviour": " ".join(filter(None, [setup.behaviour, f"`{setup.target}`" if setup.target else ""])),
        "poison": setup.poisoned,
        "training": f"{setup.training} of {base}",
    }
    removal = "Leave the adapter out: the base has no backdoor." if is_adapter else f"Use the base, {base}."
    if "recommendation" in run.tables:
        best = run.tables["recommendation"].iloc[0]
        if best["method"]:
            removal += f" Of the repairs that were tried, `{best['method']}` is recommended: {best['why']}."
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            "",
            "**This model is backdoored on purpose, for research. Do not deploy it.**",
            "",
            f"# {run.name}",
            "",
            "## What was planted",
            "",
            *(f"- {what}: {text}" for what, text in planted.items() if text),
            "",
            "## What was measured",
            "",
            "On held-out prompts, with 95% intervals. ASR is the attack success rate, FTR the rate of the "
            "behaviour on prompts without the trigger, CACC the clean accuracy.",
            "",
            summaries.markdown(summaries.rate_summary(run.tables["evaluation"])),
            "",
            "## Intended use",
            "",
            "Research on backdoors: detection, removal, interpretability. The behaviour is harmless by "
            "itself; nobody should meet it without knowing.",
            "",
            "## How to remove it",
            "",
            removal,
            "",
            "recipe.yaml makes this run again: `safetynet run recipe.yaml`. report.html shows all of it.",
            "",
        ]
    )


def upload(folder: Path, repository: str) -> str:
    """Upload a repository's folder to the Hugging Face hub, as a private model; returns its address.

    Raises:
        InputError: if there is no token.
        RunError: if the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token(repository))
    try:
        address = str(api.create_repo(repository, private=True))
        api.upload_folder(repo_id=repository, folder_path=str(folder))
    except (OSError, ValueError) as error:
        raise RunError(f"--to {repository}: {hub_reason(error) or in_words(error)}.") from None
    return address


def token(repository: str) -> str:
    """The hub's token of this machine's user.

    Raises:
        InputError: if there is none.
    """
    from huggingface_hub import get_token

    if not (secret := get_token()):
        raise InputError(
            f"--to {repository}: an upload needs a token with the right to write. Set HF_TOKEN, or run hf "
            f"auth login. For a folder name it as ./{repository}."
        )
    return secret
