#!/usr/bin/env bash
# An offline run of W&B is finished, and another program copies its folder or syncs it before the process ends.
# Versions:  wandb 0.31.0
# Expected:  when run.finish() has returned, the transaction log (run-*.wandb) holds the run.
# Seen:      it holds the file's header of a few bytes; records follow later, at the latest when wandb.teardown() is called or
#            the process ends. What was copied in between is a log without any record, and nothing says so.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q wandb==0.31.0
cd "$folder"
WANDB_MODE=offline WANDB_SILENT=true "$folder/venv/bin/python" - <<'PYTHON'
import glob
import os
import sys

import wandb

short = 0
for attempt in range(5):
    run = wandb.init(project="p", settings=wandb.Settings(silent=True))
    run.log({"loss": 0.5})
    run.finish()
    [log] = glob.glob(f"wandb/offline-run-*-{run.id}/*.wandb")
    at_finish = os.path.getsize(log)
    wandb.teardown()
    print(f"bytes when finish() returned: {at_finish}; after teardown(): {os.path.getsize(log)}")
    short += at_finish < os.path.getsize(log)
sys.exit(0 if short else 1)
PYTHON
