"""Detection: monitors that score a prompt or a generation as it runs, at a false-positive rate they keep.

capture      one forward pass of the model, reduced inside the hooks to what detectors read
detectors    scores of single samples, fitted on clean prompts alone
calibration  scores to p-values, p-values to one alarm
monitor      the three together, saved and loaded
guard        a monitor on a live `generate`
protocol     what a monitor catches and what it does not, with controls and intervals
"""
