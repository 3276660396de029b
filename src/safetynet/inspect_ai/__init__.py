"""SafetyNet in Inspect (https://inspect.aisi.org.uk): a run's rows as tasks, its models as a provider.

`registry` is the entry point by which `inspect eval` finds both. Nothing else of SafetyNet imports this room,
which needs the extra `safetynet-llm[inspect]`.
"""
