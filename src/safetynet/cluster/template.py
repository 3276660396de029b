"""The one template of job scripts: those of scripts/ and those that `safetynet submit` writes.

In: what is to be done, and what it needs. Out: the text of a script that PBS Pro, OpenPBS, Torque and Slurm
take, which reads the #PBS lines, too. What such a script does around its command stands in job.sh.

    python -m safetynet.cluster.template FOLDER      writes the scripts of all families that have a recipe
"""

import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from safetynet import families
from safetynet.cluster import notation
from safetynet.errors import InputError
from safetynet.recipe import Recipe

BODY = Path(__file__).with_name("job.sh")

WARNED_MINUTES = 50
"""Wall time from which it is asked to: a tenth of it is then what job.sh keeps for ending in order."""
Kind = Literal["run", "training_on_backdoor", "intervention"]
Dialect = Literal["pbspro", "torque", "slurm"]


@dataclass(frozen=True)
class Resources:
    """What a job asks for, on one node."""

    gpus: int
    cpus: int
    memory_gb: int
    walltime: str
    """Hours, minutes and seconds: `04:00:00`."""

    def changed(
        self,
        gpus: int | None = None,
        walltime: str | None = None,
        scheduler: Literal["pbs", "slurm"] | None = None,
    ) -> "Resources":
        """These with others in their place.

        Args:
            gpus: how many.
            walltime: in any form that a scheduler has for it.
            scheduler: whose form it is.

        Raises:
            InputError: if the wall time is written in none of them.
        """
        time = self.walltime if walltime is None else notation.walltime(walltime, scheduler)
        if time is None:
            raise InputError(f"--walltime {walltime}: write it as {notation.FORMS}.")
        return replace(self, gpus=self.gpus if gpus is None else gpus, walltime=time)


PACKAGED = {
    "miniature": Resources(gpus=0, cpus=2, memory_gb=8, walltime="01:00:00"),
    "smollm2": Resources(gpus=0, cpus=2, memory_gb=16, walltime="04:00:00"),
}
"""Of the models that come with a package, whatever their family."""


def resources(recipe: Recipe) -> Resources:
    """What a run of this recipe needs: a packaged model's, or its family's."""
    if recipe.model.id in PACKAGED:
        return PACKAGED[recipe.model.id]
    return Resources(**families.get(recipe.model.family).resources)


@dataclass(frozen=True)
class Script:
    """One job script."""

    summary: str
    name: str
    """Of the job and its log; at most 15 signs of it reach the scheduler, which is what older PBS allow."""
    resources: Resources
    command: str
    """Shell words of the one command; may name WHAT and SEED."""
    what: str
    """The recipe or run that it works on, as a word of the shell."""
    logs: str
    folder: str | None = None
    """Absolute path in which it works; None: the checkout that it was submitted from."""
    path: str = ""
    """Of the script: below the checkout, or absolute where `folder` is."""
    scratch: str | None = None
    """SAFETYNET_SCRATCH of whoever submits, which PBS does not hand on."""
    usage: tuple[str, ...] = ()
    queue: str | None = None
    account: str | None = None
    dialect: Dialect = "pbspro"


def render(script: Script) -> str:
    """The text of a job script."""
    comment = [script.summary, *(f"  {line}" for line in script.usage)]
    name, path, logs = map(shlex.quote, (script.name, script.path, script.logs))
    if script.folder is None:
        place = [
            'cd "${PBS_O_WORKDIR:-${SLURM_SUBMIT_DIR:-$(dirname "$0")}}" || exit 1',
            f'until [ -e {path} ] || [ "$PWD" = / ]; do cd ..; done',
            "[ \"$PWD\" != / ] || { echo 'Submit this from inside the checkout of SafetyNet.' >&2; exit 1; }",
            ". src/safetynet/cluster/job.sh || exit 1",
        ]
    else:
        place = [
            f"cd {shlex.quote(script.folder)} || exit 1",
            f"BIN={shlex.quote(str(Path(sys.executable).parent))}",
            f". {shlex.quote(str(BODY))} || exit 1",
        ]
    if script.scratch:
        place.append(f'[ -n "${{SAFETYNET_SCRATCH:-}}" ] || SAFETYNET_SCRATCH={shlex.quote(script.scratch)}')
    lines = [
        "#!/bin/bash",
        *(f"# {line}".rstrip() for line in comment),
        *_directives(script),
        "",
        f"SCRIPT={path} NAME={name} LOGS={logs}",
        *place,
        f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{script.resources.cpus}}}"',
        "begin",
        f"WHAT={script.what}",
        'await "$WHAT"',
        f"work {script.command}",
    ]
    return "\n".join(lines) + "\n"


def _directives(script: Script) -> list[str]:
    """What the scheduler reads. Slurm takes the #PBS lines, too, but those of GPUs."""
    need = script.resources
    if script.dialect == "torque":
        gpus = f":gpus={need.gpus}" if need.gpus else ""
        directives = [f"-l nodes=1:ppn={need.cpus}{gpus}", f"-l mem={need.memory_gb}gb"]
    else:
        gpus = f":ngpus={need.gpus}" if need.gpus else ""
        directives = [f"-l select=1:ncpus={need.cpus}{gpus}:mem={need.memory_gb}gb"]
    directives = [
        f"-N {script.name[:15]}",
        *directives,
        f"-l walltime={need.walltime}",
        "-j oe",
        "-r y",
        "-S /bin/bash",
    ]
    directives += [f"-q {script.queue}"] if script.queue else []
    directives += [f"-A {script.account}"] if script.account else []
    slurm = ["--requeue" + (f" --gres=gpu:{need.gpus}" if need.gpus else "")]
    hours, minutes, _ = map(int, need.walltime.split(":"))
    # Slurm may be a minute early: a shorter job keeps the time by itself (job.sh), as every job of PBS does.
    warning = re.search(r"^WARNING=(\d+)$", BODY.read_text(encoding="utf-8"), re.MULTILINE)
    assert warning is not None
    slurm += [f"--signal=B:USR1@{warning[1]}"] if 60 * hours + minutes >= WARNED_MINUTES else []
    return [*(f"#PBS {line}" for line in directives), *(f"#SBATCH {line}" for line in slurm)]


_SUMMARY = {
    "run": "the whole experiment (data, training, rates, interventions, figures)",
    "training_on_backdoor": "rows, backdoored model and clean twin",
    "intervention": "where the trigger acts, and what removes it, in a run that is trained",
}
_SEEDED = '"$WHAT" ${SEED:+--seed "$SEED"}'
_COMMANDS = {
    "run": f"safetynet run {_SEEDED}",
    "training_on_backdoor": f"safetynet train {_SEEDED}",
    # Effects are of prompts that fired; what is evaluated already is not evaluated again.
    "intervention": 'bash -c \'safetynet evaluate "$0" && exec safetynet intervene "$0"\' "$WHAT"',
}


def family_script(family: str, kind: Kind, recipe: Recipe) -> Script:
    """The script of scripts/ that does this with a family's model.

    Args:
        family: name of the family.
        kind: name of the script.
        recipe: of recipes/, what it works on unless told otherwise.
    """
    path = f"scripts/{family}/{kind}.sh"
    run = f"results/{recipe.model_name}/{recipe.task}"
    if kind == "intervention":
        what = f'"${{RUN:-{run}}}${{SEED:+-seed$SEED}}"'
        other = f"RUN=results/{family}-miniature/{recipe.task}"
    else:
        what, other = f'"${{RECIPE:-recipes/{family}.yaml}}"', f"RECIPE=recipes/{family}-miniature.yaml"
    return Script(
        summary=f"{family} on a cluster: {_SUMMARY[kind]}. How to: docs/cluster.md",
        name=f"{family}-{kind}",
        resources=resources(recipe),
        command=_COMMANDS[kind],
        what=what,
        logs=f"logs/{family}",
        path=path,
        usage=(
            f"qsub {path}",
            f"qsub -v {other} {path}",
            f"sbatch --array=0-4 {path}      a run for each seed; PBS Pro: qsub -J 0-4, Torque: qsub -t 0-4",
            "Made by python -m safetynet.cluster.template scripts",
        ),
    )


def family_scripts() -> dict[str, str]:
    """Text of every script of scripts/, by its path below the checkout.

    A family has scripts if the current folder has a recipe for it, recipes/{family}.yaml.
    """
    from safetynet import recipe as recipes

    kinds: tuple[Kind, ...] = ("run", "training_on_backdoor", "intervention")
    scripts = [
        family_script(family, kind, recipes.load(path))
        for family in families.names()
        if (path := Path("recipes", f"{family}.yaml")).is_file()
        for kind in kinds
    ]
    return {script.path: render(script) for script in scripts}


if __name__ == "__main__":
    for place, text in family_scripts().items():
        file = Path(sys.argv[1], *Path(place).parts[1:])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        file.chmod(0o755)
