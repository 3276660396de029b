"""Files in a suspect's folder, read without running, following or believing anything. No model is loaded."""
