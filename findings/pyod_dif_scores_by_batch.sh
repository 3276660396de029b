#!/usr/bin/env bash
# Deep isolation forest of PyOD scores the same samples one at a time and together.
# Versions:  pyod 3.6.7, torch 2.13.0, scikit-learn 1.9.1
# Expected:  a fitted detector's score of a sample is that sample's, as with IForest.
# Seen:      alone, every sample has one and the same score; together they have different ones, and others again in
#            other company. Scores are scaled over the samples of the call.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q pyod==3.6.7 scikit-learn==1.9.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
from pyod.models.dif import DIF
from pyod.models.iforest import IForest

rng = np.random.default_rng(0)
clean, asked = rng.normal(size=(300, 16)), rng.normal(size=(5, 16)) * [[1], [1], [2], [3], [4]]
results = {}
for kind in (IForest, DIF):
    detector = kind(random_state=0)
    detector.fit(clean)
    alone = np.concatenate([detector.decision_function(row[None]) for row in asked])
    together = detector.decision_function(asked)
    company = detector.decision_function(np.concatenate([asked, 10 + clean[:50]]))[:5]
    results[kind.__name__] = (np.ptp(alone), np.abs(alone - together).max(), np.abs(together - company).max())
    print(kind.__name__, "alone", alone.round(4), "together", together.round(4), "in other company", company.round(4))
stable, dif = results["IForest"], results["DIF"]
sys.exit(0 if max(stable[1:]) < 1e-9 and dif[0] < 1e-6 and min(dif[1:]) > 1e-3 else 1)
PYTHON
