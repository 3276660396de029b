#!/usr/bin/env bash
# A run is recorded by mlflow-skinny as it installs, with nothing configured: no server, no variable.
# Versions:  mlflow-skinny 3.17.2
# Expected:  it is written to the default store, or one sentence names what to install.
# Seen:      the default store is SQLite, for which the package installs neither SQLAlchemy nor Alembic, and the error speaks of
#            something else: UnsupportedModelRegistryStoreURIException, "Model registry functionality is unavailable". The other
#            local store, a folder, is refused and sends its reader to SQLite. Its README names the packages.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mlflow-skinny==3.17.2
cd "$folder"
MLFLOW_DISABLE_TELEMETRY=true "$folder/venv/bin/python" - <<'PYTHON'
import sys

import mlflow


def recorded(store: str | None) -> str:
    """What becomes of a run in a store; None is the default one."""
    mlflow.set_tracking_uri(store)
    try:
        with mlflow.start_run():
            mlflow.log_metric("loss", 0.5)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:90]}"
    return "recorded"


default = recorded(None)
print("the default store:", default)
print("a folder:         ", recorded("file:./runs"))
sys.exit(0 if default.startswith("UnsupportedModelRegistryStoreURIException") else 1)
PYTHON
