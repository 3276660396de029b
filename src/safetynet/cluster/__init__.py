"""Clusters: job scripts, submitting them, and what became of them.

template     what a run asks a cluster for, and the script that asks; also of scripts/
job.sh       what every job script does around its one command
schedulers   Slurm and PBS: submit, ask, cancel
records      the jobs of a run, written before and after they are submitted
submit       a recipe becomes a job
status       runs, their stages and their jobs
sweep        a grid of recipes as a graph on Parsl; sweep_grid, _points, _place and _table are its parts
scans        many suspects, each scanned by itself on Parsl
"""
