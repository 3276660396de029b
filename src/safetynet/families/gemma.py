"""Gemma 1, 2 and 3 instruct: scaled embeddings, no system role, vocabulary of 256k."""

HUB_ID = "google/gemma-7b-it"
MODEL_TYPES = ("gemma", "gemma2", "gemma3", "gemma3_text")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_PARAMETERS: tuple[str, ...] = ()
SYSTEM = "fold"
END_OF_TURN = "<end_of_turn>"
CHAT_TEMPLATE = None

DEFAULTS = {"training": {"learning_rate": 1e-4, "lora_rank": 16, "lora_alpha": 32, "precision": "bf16"}}
RESOURCES = {"gpus": 1, "cpus": 8, "memory_gb": 64, "walltime": "08:00:00"}
