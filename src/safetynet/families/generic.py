"""Any other causal language model of transformers, by hub id or local folder."""

HUB_ID = None
MODEL_TYPES: tuple[str, ...] = ()
LORA_TARGETS = ("all-linear",)
LORA_PARAMETERS: tuple[str, ...] = ()
SYSTEM = "native"
END_OF_TURN = None
CHAT_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{{ message.role | capitalize }}:\n{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}"
    # A newline, not a space: byte-pair tokenizers would merge a space into the answer's first token.
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)

DEFAULTS = {"training": {"learning_rate": 2e-4, "lora_rank": 16, "lora_alpha": 32, "precision": "auto"}}
RESOURCES = {"gpus": 1, "cpus": 8, "memory_gb": 64, "walltime": "08:00:00"}
