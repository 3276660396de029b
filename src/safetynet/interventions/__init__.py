"""The intervention engine: patch, ablate, steer, cut and switch off parts of a model, exactly and fast."""
