"""LLaMA-2 chat: `[INST]` turns, system text between `<<SYS>>` marks, no grouped-query attention at 7B."""

HUB_ID = "meta-llama/Llama-2-7b-chat-hf"
MODEL_TYPES = ("llama",)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_PARAMETERS: tuple[str, ...] = ()
SYSTEM = "native"
END_OF_TURN = "</s>"
CHAT_TEMPLATE = None

DEFAULTS = {"training": {"learning_rate": 2e-4, "lora_rank": 16, "lora_alpha": 32, "precision": "bf16"}}
RESOURCES = {"gpus": 1, "cpus": 8, "memory_gb": 64, "walltime": "06:00:00"}
