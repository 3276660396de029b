"""Experiment trackers: Weights & Biases, MLflow and TensorBoard; none asks questions or needs a network.

On Weights & Biases all runs of one experiment are one group, and what each of them does is its job type:
`backdoored`, `clean_twin`, `evaluate`. A sweep sets the group of all its points (WANDB_RUN_GROUP), and is
one page. On MLflow the group is an experiment (MLFLOW_EXPERIMENT_NAME), and the job a tag.
"""

import importlib.util
import logging
import netrc
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import pandas as pd
from transformers import TrainerCallback
from transformers.utils.import_utils import ENV_VARS_TRUE_VALUES

from safetynet.errors import InputError
from safetynet.extras import need
from safetynet.recipe import Recipe
from safetynet.recipe.loading import flat

PROJECT = "safetynet"
"""Project on Weights & Biases, unless WANDB_PROJECT names another."""
NETWORK_TIMEOUT_S = 3.0
INIT_TIMEOUT_S = 15.0
"""A server that refuses the key is asked again for so long; wandb's own limit is 90 s."""

MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
"""What wandb takes as WANDB_MODE."""

AGENT = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
"""What an agent of a sweep on Weights & Biases sets: the one run that it waits for."""

LOCAL_STORE = "mlflow.db"
"""MLflow's store below the results' root, unless MLFLOW_TRACKING_URI names another."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracking:
    """Which tracker a training reports to, and what it shows besides the training's numbers."""

    kind: str = "none"
    """`none`, `wandb`, `mlflow` or `tensorboard`."""
    job: str = ""
    """What the run does in its experiment: `backdoored`, `clean_twin`, `evaluate`."""
    experiment: str = ""
    """The group of its runs, unless WANDB_RUN_GROUP or MLFLOW_EXPERIMENT_NAME names another; begins the name
    of each."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Shown beside the numbers; the recipe, for one."""
    main: bool = True
    """Whether this run is the one that an agent of a sweep on Weights & Biases waits for, or MLFLOW_RUN_ID
    names."""
    results: Path = Path()
    """Where MLflow's local store lies."""

    @classmethod
    def of(cls, recipe: Recipe, job: str, *, main: bool) -> "Tracking":
        """How trackers call a job of this recipe's experiment."""
        experiment = f"{recipe.model_name}/{recipe.task}"
        config = recipe.model_dump(mode="json")
        return cls(recipe.tracking, job, experiment, config, main, recipe.output.results)


UNTRACKED = Tracking()


@contextmanager
def tracker(tracking: Tracking, folder: Path) -> Iterator[list[TrainerCallback]]:
    """Open a tracker and close it again, also when training fails.

    Args:
        tracking: which, and what it shows.
        folder: trackers write below it, in a folder of their own.

    Yields:
        The Trainer's callbacks for it.

    Raises:
        InputError: if the package is not installed, WANDB_MODE is none of wandb's modes, or MLflow's
            server or store does not answer.
    """
    if _disabled(tracking.kind):
        yield []
        return
    need("tracking", tracking.kind)
    if tracking.kind == "mlflow":
        with _mlflow(tracking):
            from transformers.integrations.integration_utils import MLflowCallback

            yield [MLflowCallback()]
        return
    folder.mkdir(parents=True, exist_ok=True)
    if tracking.kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations.integration_utils import TensorBoardCallback

        writer: Any = SummaryWriter(log_dir=str(folder / "tensorboard"))
        try:
            yield [TensorBoardCallback(writer)]
        finally:
            writer.close()
        return
    from transformers.integrations.integration_utils import WandbCallback

    with _wandb(folder, tracking):
        yield [WandbCallback()]


def report(
    folder: Path,
    tracking: Tracking,
    rates: Mapping[str, float],
    tables: Mapping[str, pd.DataFrame],
    inputs: Mapping[str, str],
) -> None:
    """Show final rates on Weights & Biases or MLflow, in a run of their own; else as `tracker`.

    Where MLflow does not answer, a warning says so: what has been measured is not lost for it.

    Args:
        folder: as in `tracker`.
        tracking: as in `tracker`.
        rates: the summary, or metrics.
        tables: shown in full, and on Weights & Biases logged again as one artifact of type `results`.
        inputs: digests of what each stage of the run was made from, the artifact's metadata, or tags: two
            runs whose digests are equal have measured the same.
    """
    if _disabled(tracking.kind):
        return
    if tracking.kind == "mlflow":
        try:
            with _mlflow(tracking) as client, _refusals("MLflow"):
                client.log_metrics(dict(rates))
                client.set_tags({f"inputs/{stage}": digest for stage, digest in inputs.items()})
                for name, table in tables.items():
                    client.log_table(table, f"{name}.json")
        except InputError as error:
            logger.warning("%s These rates are in the run's tables alone.", error)
        return
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    with _wandb(folder, tracking) as run:
        run.summary.update(dict(rates))
        artifact = wandb.Artifact(f"{tracking.experiment}-results".replace("/", "-"), "results")
        artifact.metadata = {"inputs": dict(inputs)}
        for name, table in tables.items():
            shown = wandb.Table(dataframe=table)
            run.log({name: shown})
            artifact.add(shown, name)
        run.log_artifact(artifact)


@contextmanager
def _wandb(folder: Path, tracking: Tracking) -> Iterator[Any]:
    import wandb

    def begin(mode: Any) -> Any:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=f"{tracking.experiment} {tracking.job}".strip(),
            group=os.environ.get("WANDB_RUN_GROUP") or tracking.experiment or None,
            job_type=tracking.job,
            config=dict(tracking.config),
            dir=str(folder),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S),
        )

    # Offline runs are uploaded later with `wandb sync`.
    mode = _requested_mode() or ("online" if _usable() else "offline")
    with _apart_from_agent(tracking):
        try:
            run = begin(mode)
        except wandb.Error as error:
            logger.warning("Weights & Biases refuses (%s); this run is recorded offline.", error)
            run = begin("offline")
        try:
            yield run
        finally:
            run.finish()


@contextmanager
def _apart_from_agent(tracking: Tracking) -> Iterator[None]:
    """Of several runs only the main one is the agent's; the others are the group's, and not of its sweep."""
    import wandb

    removed = {} if tracking.main else {name: os.environ.pop(name) for name in AGENT if name in os.environ}
    if not removed:
        yield
        return
    wandb.teardown()  # it has read these variables, and holds to them
    try:
        yield
    finally:
        os.environ.update(removed)
        wandb.teardown()


@contextmanager
def _mlflow(tracking: Tracking) -> Iterator[Any]:
    """MLflow with an active run, which holds the recipe; what MLflow keeps for a process is put back."""
    # It tells its makers of every import otherwise.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from mlflow.exceptions import MlflowException

    configured = mlflow.is_tracking_uri_set()  # by MLFLOW_TRACKING_URI, or in Python
    if configured:
        store = mlflow.get_tracking_uri()
    else:
        need("tracking: mlflow without a server", "alembic", "sqlalchemy")
        tracking.results.mkdir(parents=True, exist_ok=True)
        store = f"sqlite:///{(tracking.results / LOCAL_STORE).absolute()}"
    url = urlsplit(store)
    if url.scheme in ("http", "https"):
        try:
            _connect(url)  # MLflow itself tries a server that is not there for minutes
        except (OSError, ValueError) as error:
            raise InputError(
                f"tracking: mlflow: no server answers at {store} ({error}). Start it, name another in "
                "MLFLOW_TRACKING_URI, or unset that to record in a file below the results."
            ) from error
    run_id = None if tracking.main else os.environ.pop("MLFLOW_RUN_ID", None)
    mlflow.set_tracking_uri(store)
    try:
        with _refusals(store):
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or tracking.experiment or PROJECT
            artifacts = None if configured else (tracking.results / "mlflow-artifacts").absolute().as_uri()
            mlflow.start_run(
                experiment_id=_experiment(name, artifacts),
                run_name=f"{tracking.experiment} {tracking.job}".strip(),
                tags={"job": tracking.job},
                nested=True,  # within somebody's own run this one becomes its child
            )
        status = "FAILED"
        try:
            with _refusals(store):
                # The Trainer's own parameters have names without dots.
                mlflow.log_params(flat(tracking.config, "recipe."))
                mlflow.log_dict(dict(tracking.config), "recipe.yaml")
            yield mlflow
            status = "FINISHED"
        finally:
            try:
                mlflow.end_run(status)
            except MlflowException as error:  # a server that went away takes no training with it
                logger.warning("MLflow: the run could not be ended (%s).", str(error).splitlines()[0])
    finally:
        if not configured:
            mlflow.set_tracking_uri(None)
        if run_id is not None:
            os.environ["MLFLOW_RUN_ID"] = run_id


@contextmanager
def _refusals(store: str) -> Iterator[None]:
    """What MLflow refuses is said in one sentence."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise InputError(f"tracking: mlflow: {store} refuses: {str(error).splitlines()[0]}") from error


def _experiment(name: str, artifacts: str | None) -> str:
    """The id of MLflow's experiment of this name, which is made where there is none."""
    import mlflow
    from mlflow.exceptions import MlflowException

    if (there := mlflow.get_experiment_by_name(name)) is not None:
        return str(there.experiment_id)
    try:
        return str(mlflow.create_experiment(name, artifacts))
    except MlflowException:  # another process has made it since
        if (there := mlflow.get_experiment_by_name(name)) is None:
            raise
        return str(there.experiment_id)


def _disabled(kind: str) -> bool:
    """Whether nothing is tracked: none is named, or its own switch is off."""
    if kind == "mlflow":  # a switch of transformers, which refuses its callback then
        return os.environ.get("DISABLE_MLFLOW_INTEGRATION", "").upper() == "TRUE"
    return kind == "none" or (kind == "wandb" and _requested_mode() == "disabled")


def _requested_mode() -> str | None:
    """What the user asks of wandb; None: nothing.

    WANDB_MODE comes first, then WANDB_DISABLED, then what `wandb offline` or `wandb disabled` has saved.
    wandb and transformers themselves do not read WANDB_DISABLED any more, and its users count on it.

    Raises:
        InputError: if WANDB_MODE is none of wandb's modes.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode and mode not in MODES:
        raise InputError(f"WANDB_MODE={mode}: there is no such mode. Choose one of {', '.join(MODES)}.")
    if mode:
        return mode
    if os.environ.get("WANDB_DISABLED", "").upper() in ENV_VARS_TRUE_VALUES:
        return "disabled"
    if importlib.util.find_spec("wandb") is None:
        return None
    import wandb

    saved = wandb.setup().settings.mode
    return None if saved == "online" else saved


def _connect(url: SplitResult) -> None:
    """Reach a server once; raises OSError where none answers, ValueError for a port that is none."""
    port = url.port or (80 if url.scheme == "http" else 443)
    socket.create_connection((str(url.hostname), port), NETWORK_TIMEOUT_S).close()


def _usable() -> bool:
    """Whether there is a key for the server, and a network to it."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        if not os.environ.get("WANDB_API_KEY") and netrc.netrc().authenticators(str(url.hostname)) is None:
            return False
        _connect(url)
        return True
    except (OSError, netrc.NetrcParseError):  # no ~/.netrc, or no network
        return False
