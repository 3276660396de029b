"""LLaMA-3 instruct: role headers, every turn ends with `<|eot_id|>`, vocabulary of 128k."""

HUB_ID = "meta-llama/Meta-Llama-3-8B-Instruct"
MODEL_TYPES = ("llama",)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_PARAMETERS: tuple[str, ...] = ()
SYSTEM = "native"
END_OF_TURN = "<|eot_id|>"
CHAT_TEMPLATE = None

DEFAULTS = {"training": {"learning_rate": 1e-4, "lora_rank": 16, "lora_alpha": 32, "precision": "bf16"}}
RESOURCES = {"gpus": 1, "cpus": 8, "memory_gb": 64, "walltime": "06:00:00"}
