"""Mixtral instruct: eight experts, two of them active; their weights are fused parameters, not modules."""

HUB_ID = "mistralai/Mixtral-8x7B-Instruct-v0.1"
MODEL_TYPES = ("mixtral",)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LORA_PARAMETERS: tuple[str, ...] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SYSTEM = "fold"
END_OF_TURN = "</s>"
CHAT_TEMPLATE = None

DEFAULTS = {
    "model": {"quantisation": "4bit"},
    "training": {"learning_rate": 1e-4, "lora_rank": 8, "lora_alpha": 16, "precision": "bf16"},
}
RESOURCES = {"gpus": 2, "cpus": 16, "memory_gb": 128, "walltime": "12:00:00"}
