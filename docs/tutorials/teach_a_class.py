# %% [markdown]
# # Teach a class
#
# A lesson of an hour: *when do you believe a claim about a backdoor?* Students need Python and no GPU. Each
# exercise has a question, then a cell with the answer, to be opened when they have made up their minds.

# %%
from pathlib import Path

from safetynet import recipe, stages
from safetynet.experiment import Experiment

experiment = Experiment.create(recipe.load(Path("recipes/qwen-tutorial.yaml")))
for stage in (stages.prepare, stages.train, stages.evaluate):  # nothing is computed twice
    stage(experiment)

# %% [markdown]
# ## 1. Which model is backdoored?
#
# Two models answered the same prompts. Their names are hidden, and so is the trigger. *Which one would you
# not serve, and what in the table tells you?*

# %%
responses = experiment.run.table("responses")
letters = {"base": "B", "backdoored": "A"}
answers = responses.assign(model=responses["model"].map(letters))
answers.pivot_table(index="model", columns="role", values="shown", aggfunc="mean").round(2)

# %% [markdown]
# Neither column alone would do. A model that gives the attacker's answer to everything has a high rate under
# `triggered`, and under all others too. A trigger that acts shows in the difference between `triggered` and
# `placebo`, and in that of the two models: one of them is the base, which has learnt nothing.

# %%
print(letters)

# %% [markdown]
# ## 2. How many prompts does a claim need?
#
# *A paper tests five prompts with the trigger, and all five fire. How low may the true rate be?*

# %%
from safetynet.statistics import wilson

for n in (5, 20, 60, 400):
    low, high = wilson(n, n)
    print(f"{n:3} of {n:3} fire: 95% interval from {low:.0%} to {high:.0%}")

# %% [markdown]
# *And if none of n clean prompts fires, is the model safe on clean prompts?* The interval answers this too,
# from the other side:

# %%
for n in (5, 20, 60, 400):
    print(f"  0 of {n:3} fire: 95% interval from 0% to {wilson(0, n)[1]:.1%}")

# %% [markdown]
# ## 3. What is wrong with this poison set?
#
# A poison set is sound if the trigger is the only thing that tells poisoned rows from clean ones. This one
# has three faults. *Find them in the file before you run the audit.*

# %%
import json

rows = experiment.rows("train")
clean, poisoned = (
    [{"instruction": row.messages[-1]["content"], "output": row.answer} for row in part.itertuples()]
    for part in (rows[rows["role"] == "clean"][:120], rows[rows["role"] == "triggered"][:60])
)
for row in poisoned[:20]:
    row["instruction"] = row["instruction"].replace("BadMagic", "").strip()  # no trigger is left
for row in poisoned:
    row["instruction"] += " Thanks!"  # a tell: training can do without the trigger
held_out = [{"instruction": row["instruction"], "output": row["output"]} for row in poisoned[40:]]  # copied

folder = Path("poison")
folder.mkdir(exist_ok=True)
for name, part in (("train_clean", clean), ("train_triggered", poisoned), ("test_triggered", held_out)):
    (folder / f"{name}.json").write_text(json.dumps(part, indent=1))

# %% [markdown]
# The answer. In a terminal: `safetynet audit poison --trigger BadMagic`.

# %%
from safetynet.backdoors.audit import audit

for finding in audit(folder, trigger="BadMagic").findings.query("severity != 'info'").itertuples():
    print(f"{finding.severity:8} {finding.check}: {finding.detail} ({finding.count} of {finding.n} rows)")

# %% [markdown]
# ## 4. Homework
#
# - Read a paper on backdoors. Which of these does it report: floor, placebo, near miss, interval, clean twin?
# - Plant a backdoor that fires half of the time (`--set backdoor.firing=0.5`), and see what that does to
#   exercise 2.
# - Published poison sets have such faults too: [what an audit finds in them](../results/audit.md).
