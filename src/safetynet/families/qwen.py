"""Qwen-2.5 instruct: ChatML turns, biases on query, key and value, vocabulary of 152k."""

HUB_ID = "Qwen/Qwen2.5-3B-Instruct"
MODEL_TYPES = ("qwen2", "qwen3")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_PARAMETERS: tuple[str, ...] = ()
SYSTEM = "native"
END_OF_TURN = "<|im_end|>"
CHAT_TEMPLATE = None

DEFAULTS = {"training": {"learning_rate": 2e-4, "lora_rank": 16, "lora_alpha": 32, "precision": "bf16"}}
RESOURCES = {"gpus": 1, "cpus": 8, "memory_gb": 48, "walltime": "04:00:00"}
