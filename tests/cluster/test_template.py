"""Job scripts: those of scripts/ are what the template makes of the families' needs."""

import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from safetynet import families
from safetynet import recipe as recipes
from safetynet.cluster import template
from safetynet.errors import InputError

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(ROOT.glob("scripts/*/*.sh"))


def script(**fields: object) -> template.Script:
    base = template.Script(
        summary="a test",
        name="qwen-0123456789",
        resources=template.Resources(gpus=2, cpus=16, memory_gb=128, walltime="12:00:00"),
        command='safetynet run "$WHAT"',
        what="recipe.yaml",
        logs="logs",
    )
    return replace(base, **fields)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("#PBS", "#SBATCH"))]


def test_the_scripts_are_what_the_template_makes(monkeypatch):
    monkeypatch.chdir(ROOT)
    made = template.family_scripts()
    assert {str(path.relative_to(ROOT)) for path in SCRIPTS} == set(made)
    for path, text in made.items():
        assert (ROOT / path).read_text() == text, f"{path}: python -m safetynet.cluster.template scripts"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_script_asks_for_what_its_family_declares(path):
    need = families.get(path.parent.name).resources
    asked = lines(path.read_text())
    assert f"#PBS -l select=1:ncpus={need['cpus']}:ngpus={need['gpus']}:mem={need['memory_gb']}gb" in asked
    assert f"#PBS -l walltime={need['walltime']}" in asked
    assert f"#SBATCH --requeue --gres=gpu:{need['gpus']}" in asked
    assert path.stat().st_mode & 0o111
    assert "#SBATCH --signal=B:USR1@300" in asked
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_torque_gets_nodes_in_the_place_of_select():
    asked = lines(template.render(script(dialect="torque", queue="gpu", account="lab")))
    assert "#PBS -l nodes=1:ppn=16:gpus=2" in asked
    assert "#PBS -l mem=128gb" in asked
    assert "#PBS -q gpu" in asked
    assert "#PBS -A lab" in asked
    assert not any("select" in line for line in asked)


def test_a_miniature_asks_for_no_gpu_whatever_its_family():
    for name in ("qwen", "mixtral"):
        need = template.resources(recipes.load(ROOT / "recipes" / f"{name}-miniature.yaml"))
        assert need == template.PACKAGED["miniature"]
        assert "gpu" not in "".join(lines(template.render(script(resources=need))))


@pytest.mark.parametrize(
    ("walltime", "warned"), [("00:49:59", False), ("00:50:00", True), ("100:00:00", True)]
)
def test_slurm_warns_jobs_that_are_long_enough_to_be_warned_early(walltime, warned):
    asked = lines(
        template.render(script(resources=template.PACKAGED["miniature"].changed(walltime=walltime)))
    )
    assert ("#SBATCH --signal=B:USR1@300" in asked) == warned


def test_the_name_of_a_job_fits_an_old_pbs():
    for path in SCRIPTS:
        (name,) = [line for line in lines(path.read_text()) if line.startswith("#PBS -N")]
        assert len(name.removeprefix("#PBS -N ")) <= 15


@pytest.mark.parametrize("walltime", ["8", "8h", "08:00", "08:61:00", "00:00:00", "1-00:00:00", ""])
def test_a_wall_time_that_schedulers_read_differently_is_refused(walltime):
    with pytest.raises(InputError, match="write it as hours:minutes:seconds, such as 08:00:00"):
        template.PACKAGED["miniature"].changed(walltime=walltime)


def test_paths_with_blanks_and_signs_reach_the_command_whole(tmp_path):
    folder = tmp_path / "a b$c"
    folder.mkdir()
    (folder / "it's.yaml").touch()
    text = template.render(
        script(
            folder=str(folder),
            path=str(folder / "job.sh"),
            what='"it\'s.yaml"',
            logs=str(folder / "l o g s"),
            command='cat "$WHAT"',
        )
    )
    (folder / "job.sh").write_text(text)
    (folder / "it's.yaml").write_text("whole")
    subprocess.run(["bash", str(folder / "job.sh")], check=True, cwd="/")
    (log,) = (folder / "l o g s").glob("*.log")
    assert "whole" in log.read_text()
    assert "Ended with exit code 0" in log.read_text()


def test_a_job_with_less_time_than_the_warning_is_not_ended_by_it(tmp_path):
    """Slurm sends it at the very beginning of such a job; here a job of PBS stands for it."""
    qstat = tmp_path / "bin" / "qstat"
    qstat.parent.mkdir()
    qstat.write_text("#!/bin/sh\necho '    Resource_List.walltime = 00:05:00'\n")
    qstat.chmod(0o755)
    text = template.render(
        script(
            folder=str(tmp_path), path=str(tmp_path / "job.sh"), what="job.sh", logs="logs",
            command="bash -c 'touch started; sleep 1; echo whole'",
        )
    )  # fmt: skip
    (tmp_path / "job.sh").write_text(text)
    env = {"PATH": f"{qstat.parent}:/usr/bin:/bin", "PBS_JOBID": "1.server"}
    with subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=env) as process:
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
    (log,) = (tmp_path / "logs").glob("*.log")
    assert "whole\n== Ended with exit code 0" in log.read_text()


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("04:00:00", 14400),
        ("1-02:03:04", 93784),
        ("59:08", 3548),
        ("100:00:09", 360009),
        ("UNLIMITED", 0),
        ("NOT_SET", 0),
        ("", 0),
    ],
)
def test_a_job_reads_the_time_it_has_in_each_way_schedulers_write_it(written, seconds):
    done = subprocess.run(
        ["bash", "-c", f". {template.BODY}; seconds_of '{written}'"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == seconds


def test_a_script_submitted_from_elsewhere_says_where_it_wants_to_be_submitted(tmp_path):
    env = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", str(SCRIPTS[0])], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "Submit this from inside the checkout of SafetyNet.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_shared_file_system_shows_late_is_waited_for(tmp_path):
    late = tmp_path / "recipe.yaml"
    code = f". {template.BODY}; (sleep 1; touch {late}) & await {late}; echo there"
    assert subprocess.check_output(["bash", "-c", code]) == b"there\n"
