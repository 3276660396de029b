"""Prompts: conversations, and the one serialiser that turns them into token ids, spans and labels."""

from safetynet.prompts.conversation import Conversation, Message, prompt_hash
from safetynet.prompts.serialiser import IGNORED, Encoded, Serialiser, TriggerSpan, pad

__all__ = [
    "IGNORED",
    "Conversation",
    "Encoded",
    "Message",
    "Serialiser",
    "TriggerSpan",
    "pad",
    "prompt_hash",
]
