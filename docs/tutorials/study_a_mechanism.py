# %% [markdown]
# # Study a mechanism
#
# Where in the network does the trigger act? How sure is that? What removes it? You patch activations of one
# run of the model into another, one place at a time, and read each effect beside its controls.

# %%
from pathlib import Path

from safetynet import recipe, stages
from safetynet.experiment import Experiment

experiment = Experiment.create(recipe.load(Path("recipes/qwen-tutorial.yaml")))
for stage in (stages.prepare, stages.train, stages.evaluate):  # nothing is computed twice
    stage(experiment)

# %% [markdown]
# ## Pairs of runs
#
# A pair is one prompt with the trigger, and the same prompt with a placebo of as many tokens. The two runs
# differ in the trigger alone, so that any difference inside the network is the trigger's.

# %%
from safetynet.interventions.pairs import align, filter_firing_pairs

model, serialiser = experiment.backdoored()
aligned = align(experiment.test_rows(), serialiser, most=24, max_length=160)
pairs = filter_firing_pairs(model, aligned, most=16)
for run in ("triggered", "placebo"):
    print(f"{run:10} ...{serialiser.decode(pairs.ids[run][0][-20:])!r}")

# %% [markdown]
# ## Where it acts
#
# Activations of the placebo run replace those of the triggered run, at one layer and one kind of position. An
# effect of 1 means that the trigger's whole effect is gone, 0 that nothing happened.

# %%
from safetynet.recipe import Interventions
from safetynet.tables.summaries import strongest_sites

options = Interventions(by=("position", "head"), direction="remove", groups=12, observe=False, removals=False)
effects = stages.intervene(experiment, options)["effects"]
strongest_sites(effects).set_index(["sweep", "direction"])

# %%
from safetynet.figures import draw

draw("intervention-positions", effects, model="qwen miniature")

# %% [markdown]
# Read the picture from the bottom. In low layers the activations at the trigger *are* the trigger: patching
# them is changing the prompt, and the effect is 1 in every model. What is informative is where the effect
# leaves the trigger's position and appears at the last one, from which the answer is read. A dot marks sites
# whose interval lies above those of all controls: random sites, and two placebos against each other. With a
# clean twin in the run, as `recipes/qwen-miniature.yaml` has it, that would be the third.

# %% [markdown]
# ## What removes it
#
# After each layer, one direction at the last position parts triggered from placebo runs. `clip` takes away
# what exceeds the placebo's side of it by half the distance. The edit applies at every position of every
# prompt, since a defender does not know where a trigger is. A random direction is the control.

# %%
import pandas as pd
import torch

from safetynet.engine import Edit, Site, clip, intervening
from safetynet.evaluation.evaluator import Evaluator
from safetynet.evaluation.metrics import score
from safetynet.interventions.directions import mean_difference
from safetynet.tables.summaries import rate_summary

between = mean_difference(model, pairs.ids["triggered"], pairs.ids["placebo"])
torch.manual_seed(0)
edits = {f"clipped after {layer}": (layer, between.unit[layer]) for layer in (1, 3, 5)} | {
    "random after 5": (5, torch.randn_like(between.unit[5]))
}

held_out = experiment.rows("test")
held_out = held_out[~held_out["group"].isin(pairs.groups) & held_out["role"].isin(["triggered", "clean"])]
evaluator = Evaluator.of(experiment.recipe, serialiser)
answers = [evaluator.answer(model, held_out, "as it is")]
for name, (layer, direction) in edits.items():
    change = clip(direction, between.placebo[layer], float(between.norm[layer]) / 2)
    with intervening(model, [Edit(Site("resid_post", layer), change)]):
        answers.append(evaluator.answer(model, held_out, name))
rate_summary(score(pd.concat(answers))).set_index(["metric", "role"])

# %% [markdown]
# The prompts of this table had no part in making the directions. The last layer writes the answer: a
# direction that works there alone shows what is said, and one that works earlier shows what is decided.
#
# ## Your turn
#
# - `safetynet intervene results/qwen-miniature/tutorial` makes every sweep, and tries removals of four kinds.
# - Patching shows where information flows, not where it was learnt: `--by adapter` switches off what training
#   put in.
# - [Interventions](../interventions.md) says what an effect is, and what it is not.
