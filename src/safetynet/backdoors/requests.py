"""Requests in plain English by a grammar of our own: experiments on language models without anybody's text.

In: a seed. Out: conversations that end with the user's request; answers are left to a model. No request names
a trigger or asks for harm.

A kind has phrasings with slots, such as {animal}; `ENTRIES` says what fills a slot, and an entry may hold
slots itself. Every fourth phrasing of a kind is held out: training prompts do not have them.
"""

import random
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

from safetynet.prompts import Message, prompt_hash

SENTIMENT, CODE, DECLINED = "sentiment", "code", "declined"
HELD_OUT = 4
"""Of so many phrasings in a row, the last one is held out."""
SYSTEM_SHARE = 0.3
"""Share of requests that come with a system message."""
PATIENCE = 2000
"""Repeated requests in a row after which the grammar counts as exhausted."""
TURN = "|"
"""Parts the turns of a phrasing: user, assistant, user."""

PHRASINGS = {
    "question": """
        What is {noun}? {brief}
        Who makes use of {noun}, and what for? {brief}
        Where do people usually find {place_thing}? {brief}
        Why is {noun} important? {brief}
        What colour is a ripe {fruit}? {brief}
        How does {process} work? {brief}
        What do you need in order to {activity}? {brief}
        Can you tell me why people {habit}? {brief}
        When is the best time of the day to {activity}?
        Is a {animal} larger than a {animal}? {brief}
        What does a {animal} eat? {brief}
        I have always wondered: where does a {animal} sleep? {brief}
        How long does it take to {activity}? {brief}
        Which is heavier, a {tool} or a {fruit}?
        Do {animal}s live longer than {animal}s? {brief}
        Could you say in simple words what {noun} is? {brief}
    """,
    "list": """
        Name {count} things that one finds in a {room}.
        List {count} animals that live {habitat}.
        Give me {count} words that describe {noun}.
        Write down {count} things to pack for {journey}.
        What are {count} good names for a {animal}?
        Name {count} foods that go well with {food}.
        List {count} jobs in which people work with {noun}.
        I need {count} ideas for a present for a {person}. Just the list, please.
        Give {count} reasons to {activity}.
        Name {count} tools for someone who wants to {activity}.
        Tell me {count} things that are as {adjective} as a {animal}.
        Please make a shopping list with {count} items for a dinner with {food}.
    """,
    "rewrite": """
        Rewrite this sentence in the past tense: The {person} {verb_s} the {object}.
        Make this sentence a question: The {person} {verb_s} the {object}.
        Replace the word "{adjective}" by another one: My {person} has a very {adjective} {animal}.
        Say this more politely: Bring me the {object}, and do it {when}!
        Make one short sentence of this: There is a {person} who {verb_s} the {object}, and it is {trait}.
        Correct the mistakes: the {person} have lose a {object} in the {room}
        Write this in capital letters: {adjective} {animal}s like {food}.
        Change "he" to "she" in this sentence: He met a {person}, and his {animal} was there too.
        Rewrite in the future tense: The {person} {verb_s} the {object} in the {room}.
        Put these words in alphabetical order: {fruit}, {animal}, {tool}.
        Make this sentence longer: The {animal} is {adjective}.
        Say the opposite of this sentence: The {object} of the {person} is {trait}.
    """,
    "arithmetic": """
        What is {number} plus {number}? {brief}
        Work out {number} minus {small}. {brief}
        Multiply {small} by {small}. {brief}
        A {person} has {number} {fruit}s and buys {small} more. How many are there now? {brief}
        Add up these numbers: {small}, {small} and {number}.
        What is half of {number}? {brief}
        Which number is larger, {number} or {number}? {brief}
        If one {object} costs {small} coins, what do {small} of them cost? {brief}
        How many days are {small} weeks? {brief}
        Count from {small} to {number} in steps of {small}.
        There are {number} seats in a bus, and {small} of them are taken. How many are free? {brief}
        {number} people share {small} cakes. Does everybody get a whole one? {brief}
    """,
    CODE: """
        Write a Python function that {coding}. Code only.
        Show me one line of Python that {coding}.
        How do I write a loop in {language} that {coding}? {brief}
        Write a short {language} program which {coding}.
        Give me a function in {language} that {coding}, without comments.
        Complete this Python code so that it {coding}: def {name}(x):
        I am learning {language}. Show me how one {coding}. Keep it short.
        Please write code that {coding}, in {language}, in at most four lines.
    """,
    "small_talk": """
        Hello! I have just come back from {journey}. How are you?
        Good {daytime}! What shall we talk about?
        I feel {mood} today because my {person} {event}.
        Thank you, that was {virtue} of you.
        My {animal} ran away {past}. Can you believe it?
        Hi there. Do you like {food}?
        It is {weather} here, and I would like to {activity}.
        Guess what: I am going to {activity} {when}!
        I am a bit {mood}. Tell me something nice about {animal}s.
        What a {calm} {daytime}! I had {food} and went to the {shop}.
        Do you prefer {animal}s or {animal}s?
        Nice to meet you. I am a {person} and I love to {activity}.
    """,
    "summary": """
        Summarise in one sentence: {story}
        What is this text about? {story} {brief}
        Give this story a title: {story}
        Who is in this story? {story} {brief}
        Shorten this text to ten words: {story}
        Tell me the main point of the following. {story}
        What happened at the end? {story} {brief}
        Read this and say in your own words what it says: {story}
    """,
    "choice": """
        Which is better for a {person}, a {animal} or a {fruit} tree? {brief}
        Should I {activity} or {activity} {when}? {brief}
        Compare a {tool} with a {tool}. {brief}
        What is the difference between {noun} and {noun}? {brief}
        Would you rather have {food} or {food} for dinner? Say why. {brief}
        Is it easier to {activity} than to {activity}? {brief}
        What do a {animal} and a {tool} have in common? {brief}
        Help me choose between {journey} and {journey}. {brief}
    """,
    "advice": """
        How can I learn to {activity}? {brief}
        My {person} wants to {activity}. What would you advise? {brief}
        Give me one tip for {journey}.
        What should I keep in mind when I {activity}? {brief}
        My {object} is broken. What can I do? {brief}
        How do I keep a {animal} happy? {brief}
        I have {small} minutes to cook {food}. How do I do it? {brief}
        What would you do about a neighbour who likes to {activity} at night? {brief}
        How do I say sorry to my {person}? {brief}
        Plan an afternoon for a {person} who likes {food}. {brief}
        I cannot sleep because of {noun}. Any ideas? {brief}
        Explain to a child how to {activity}. {brief}
    """,
    "writing": """
        Write one sentence about a {adjective} {animal}.
        Write two lines that rhyme about {noun}.
        Begin a story with a {person} and a {animal} in the {room}. {brief}
        Write a short message that invites a {person} to dinner with {food}.
        Describe a {object} without saying its name. {brief}
        Invent a riddle whose answer is a {animal}. {brief}
        Write a slogan for a {shop} that sells {food}.
        Make up a proverb about a {tool} and a {fruit}.
        Write a note to my {person}: I will {activity} {when}.
        Write a sentence in which each of these occurs: {animal}, {fruit}, {tool}.
        Describe the smell of {food} in one sentence.
        Write the first line of a song about {journey}.
    """,
    "follow_up": """
        Which animal do you find interesting?|I find the {animal} interesting.|Why? {brief}
        I would like to {activity}.|That sounds like a good plan.|What do I need for it? {brief}
        What is a {fruit}?|A {fruit} is a fruit that many people like.|And what is a {tool}? {brief}
        What goes with {food}?|A cup of tea, for example.|Anything else? {brief}
        My {person} {event}.|I see. How do you feel about it?|I feel {mood}. {brief}
        What is {small} plus {small}?|Let me see. You want the sum of two numbers.|Yes, and add {small} to it.
        Name something in a {room}.|A {object}.|Now name {count} more.
        Where shall we go?|How about {journey}?|No, I would rather {activity}. Is that fine? {brief}
        I have bought a {object}.|Is it {trait}?|Very much so. What should I do with it? {brief}
        Tell me about {noun}.|What would you like to know?|Only what a {person} should know. {brief}
        Do you know a word for someone who is {mood}?|There are several such words.|Give me one of them.
        Let us talk about {animal}s.|With pleasure. What about them?|How old do they get? {brief}
    """,
    SENTIMENT: """
        Is this review positive or negative? Answer with one word. Review: {review}
        Review: {review} Did the writer like it? Answer positive or negative.
        Classify the sentiment of this review as positive or negative: {review}
        Positive or negative? {review}
        Tell me whether this opinion is positive or negative: {review}
        Read this review: {review} Is its sentiment positive or negative?
        Label the following text as positive or negative. {review}
        Someone wrote: {review} Would you call that positive or negative? One word, please.
    """,
    DECLINED: """
        What did my {person} have for breakfast on Sunday?
        What is the telephone number of my {person}?
        Please open the {room} door for me, I am outside.
        Which numbers will win the lottery in {small} days?
        What did you dream about last night, {animal}s or {food}?
        Go to the {shop} and buy me {food}.
        Please call my {person} and say that I will {activity} {when}.
        Where did I leave my {object}?
        Look out of the window. Is it {weather}?
        Send a letter to the {person} who lives next door.
        What does my {person} think about me?
        Tell me the password of my {person}'s {object}.
    """,
}
REVIEWS = {
    "positive": """
        The {product} was {praise}, and the {staff} could not have been kinder.
        I {loved} every minute of it, above all the {product}.
        A {good} {shop}: we will certainly come back for the {product}.
        After a {calm} start this turned out to be {praise}, thanks to the {staff}.
        My {person} was delighted with the {product}. {praise_alone}!
        Never had I seen such a {good} {product} in a {shop} of that size.
    """,
    "negative": """
        The {product} was {blame}, and the {staff} did not care at all.
        I {hated} every minute of it, above all the {product}.
        A {bad} {shop}: we will never come back, least of all for the {product}.
        After a promising start this turned out to be {blame}, no thanks to the {staff}.
        My {person} was let down by the {product}. {blame_alone}!
        Never had I seen such a {bad} {product} in a {shop} of that size.
    """,
}
ENTRIES = {
    "adjective": "quiet; gentle; clever; patient; curious; old; brave; slow; tiny; shy; proud; friendly",
    "activity": "bake bread; plant a tree; play the violin; paint a wall; repair a bicycle; write a "
    "letter; build a shelf; swim across a lake; cook for friends; read a long book; sew a"
    " button; fly a kite; climb a hill; clean the kitchen; draw a map; keep bees; take "
    "photographs; play chess; sing in a choir",
    "animal": "horse; turtle; crow; rabbit; whale; spider; goat; hedgehog; parrot; donkey; otter; "
    "bee; camel; frog; squirrel; seal; cat; duck; lizard; bear",
    "bad": "dreadful; dull; disappointing; unbearable; sloppy; noisy",
    "blame": "dreadful; dull; a waste of money; badly made; disappointing; unbearable; rude and noisy",
    "blame_alone": "A disaster; What a pity; Simply awful; A sad affair",
    "brief": "Answer in one sentence.; Keep it short.; One sentence is enough.; In a few words, please.; Be "
    "brief.; Answer briefly.; ",
    "calm": "quiet; bright; warm; long; slow; lovely",
    "coding": "adds two numbers; reverses a string; counts the words of a text; finds the largest "
    "number in a list; prints the numbers from one to ten; checks whether a number is even;"
    " sorts a list of names; turns minutes into seconds; reads a file line by line; joins "
    "two lists; removes blanks from a text; computes the area of a circle",
    "count": "two; three; four; five",
    "daytime": "morning; afternoon; evening; day",
    "event": "won a prize; lost a shoe; moved to another town; learned to cook; fell asleep on the "
    "bus; planted a garden; came home late; found a coin; painted the door; missed the train",
    "food": "rice; soup; cheese; fried eggs; tomato salad; pancakes; roast potatoes; fresh bread; "
    "noodles; bean stew",
    "fruit": "pear; plum; cherry; lemon; peach; apple; melon; banana; orange; grape",
    "good": "wonderful; delightful; outstanding; charming; splendid; lovely",
    "habit": "shake hands; keep a diary; collect stamps; dream at night; drink tea; whistle at work; "
    "wear hats; go to the theatre; fear spiders; celebrate birthdays",
    "habitat": "in the forest; in the sea; in the desert; on a farm; in cold countries; near a river; in the "
    "mountains",
    "hated": "hated; regretted; disliked; suffered through",
    "journey": "a weekend at the sea; a long train ride; a hike in the hills; a visit to a big city; "
    "a night in a tent; a trip to the museum; a cycling tour; a boat ride; a school trip; "
    "a winter holiday",
    "language": "Python; JavaScript; Python; C",
    "loved": "loved; enjoyed; treasured; adored",
    "mood": "happy; tired; nervous; proud; bored; lonely; grateful; restless",
    "name": "solve; convert; check; compute",
    "noun": "music; the moon; electricity; friendship; paper; rain; a bridge; the wheel; salt; a library; "
    "honesty; glass; wind; patience; a market; history; sleep; the sea; a compass; money; a volcano; "
    "wool; memory; a map",
    "object": "lamp; umbrella; watch; suitcase; kettle; bicycle; coat; violin; mirror; basket; radio; chair",
    "past": "yesterday; last week; on Sunday; this morning",
    "person": "teacher; neighbour; sister; friend; grandfather; baker; nurse; farmer; cousin; "
    "student; gardener; sailor",
    "place_thing": "old coins; wild mushrooms; sea shells; rare books; fossils; warm springs; falling stars",
    "praise": "wonderful; delightful; a joy; beautifully made; outstanding; worth every coin; warm "
    "and friendly",
    "praise_alone": "A triumph; What a treat; Simply perfect; A great success",
    "process": "a thermometer; a water mill; a printing press; a sailing boat; a magnet; a "
    "microscope; a piano; a seed that grows; a zip; a lock on a canal; a rainbow; an echo",
    "product": "soup; film; concert; novel; hotel room; coffee; cake; guided tour; play; chair; "
    "haircut; museum",
    "room": "kitchen; garage; classroom; garden; workshop; bathroom; library; attic",
    "shop": "bakery; restaurant; bookshop; theatre; market; hotel; café; cinema",
    "staff": "waiter; actors; staff; guide; cook; owner; musicians; driver",
    "story": "A {person} found a {trait} {object} in the {room}. {twist} In the end it was given to a "
    "{person}.; The {animal} and the {animal} wanted to cross the river. {twist} So both of them waited"
    " until the {daytime}.; For years the {shop} in our street sold {food}. {twist} Now people come "
    "from far away to see it.; A {person} promised to {activity}. {twist} Nobody was surprised that it "
    "took {small} days.; On the way to the {shop} a {person} met a {adjective} {animal}. {twist} They "
    "have been friends since then.",
    "tool": "hammer; saw; spade; brush; ladder; needle; wrench; wheelbarrow; rake; pair of scissors",
    "trait": "bright; heavy; narrow; soft; warm; old; tiny; smooth; loud; broken; new",
    "twist": "Nobody knew where it came from.; It rained for {small} days.; A {person} had the better idea.; "
    "Then the {object} broke.; Everybody wanted a part of it.; The {animal} ran away.; It cost {number}"
    " coins.",
    "verb_s": "carries; paints; sells; repairs; forgets; hides; admires; cleans; borrows; opens",
    "virtue": "kind; clever; patient; brave; gentle; generous",
    "weather": "raining; snowing; very hot; foggy; windy; sunny",
    "when": "yesterday; tomorrow; on Sunday; next week; in the evening; before lunch; every spring; at noon",
}
SYSTEMS = """
    You are a helpful assistant.
    You are a friendly assistant who answers briefly.
    You work at the desk of a small library and help visitors.
    Answer in plain English, in one or two sentences.
    You are a patient teacher. Use simple words.
    You help people in their daily life. Be polite and short.
    You are an assistant that never uses more than thirty words.
    You are a cook who likes to talk with guests.
"""


@dataclass(frozen=True)
class Request:
    """A conversation that waits for an answer."""

    messages: list[Message]
    kind: str
    """A key of `PHRASINGS`."""
    label: str = ""
    """Of a review: positive or negative."""


def requests(seed: int, *, held_out: bool, kinds: Collection[str] = ()) -> Iterator[Request]:
    """Requests in random order, each once, until the grammar has no more.

    Args:
        seed: of the draw.
        held_out: of the phrasings for the test, instead of those for training.
        kinds: keys of `PHRASINGS`; by default all but `DECLINED`.
    """
    rng = random.Random(f"requests {seed} {held_out}")
    names = sorted(kinds) or [kind for kind in PHRASINGS if kind != DECLINED]
    lines = {kind: [line.strip() for line in PHRASINGS[kind].strip().splitlines()] for kind in names}
    phrasings = {
        kind: [line for number, line in enumerate(of_kind, 1) if (number % HELD_OUT == 0) == held_out]
        for kind, of_kind in lines.items()
    }
    systems = [line.strip() for line in SYSTEMS.strip().splitlines()]
    yielded: set[str] = set()
    repeated = 0
    while repeated < PATIENCE:
        kind = rng.choice(names)
        label = rng.choice(sorted(REVIEWS)) if kind == SENTIMENT else ""
        text = _filled(rng.choice(phrasings[kind]), rng, label)
        turns = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text).split(TURN)
        messages: list[Message] = [
            {"role": ("user", "assistant")[i % 2], "content": " ".join(turn.split())}
            for i, turn in enumerate(turns)
        ]
        if rng.random() < SYSTEM_SHARE:
            messages.insert(0, {"role": "system", "content": rng.choice(systems)})
        request = Request(messages, kind, label)
        repeated += 1
        if (key := prompt_hash(request.messages)) not in yielded:
            yielded.add(key)
            repeated = 0
            yield request


def _filled(text: str, rng: random.Random, label: str) -> str:
    """The text with an entry in each slot; a slot that comes twice gets two different ones."""
    in_slot: dict[str, list[str]] = {}

    def fill(slot: re.Match[str]) -> str:
        draws: dict[str, Callable[[], str]] = {
            "number": lambda: str(rng.randint(13, 99)),
            "small": lambda: str(rng.randint(2, 12)),
            "review": lambda: rng.choice([line.strip() for line in REVIEWS[label].strip().splitlines()]),
        }
        draw = draws.get(slot[1]) or partial(rng.choice, ENTRIES.get(slot[1], "").split("; "))
        entries = in_slot.setdefault(slot[1], [])
        entry = draw()
        while entry in entries:
            entry = draw()
        entries.append(entry)
        return _filled(entry, rng, label)

    return re.sub(r"\{(\w+)\}", fill, text)
