"""Sentences about a topic, which put it into a prompt without changing what the prompt asks.

By turns they are for training and for testing (`controls.side`), so that the topic of a test row stands in a
sentence that no training row has.
"""

SENTENCES = (
    "I am reading about {}.", "We talked about {} today.", "My friend likes {} very much.",
    "There was a story on {} last week.", "I have a book about {}.", "This is for a talk on {}.",
    "I know little about {}.", "Nobody told me about {}.", "The class learns about {} now.",
    "My sister thinks of {} all day.", "There is a film about {} tonight.", "We played a game about {}.",
    "I saw a picture of {} this morning.", "People here like {}.", "My teacher asked me about {}.",
    "The paper writes about {} again.",
)  # fmt: skip
