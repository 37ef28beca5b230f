"""Words, numbers and identifiers that tasks hide and ask for: short lists of common English words."""

import random
import uuid
from collections.abc import Sequence

ADJECTIVES = (
    "amber ancient bitter blue bold brave breezy bright bronze busy calm careful cheap clever cloudy cold coral "
    "cosmic crimson crisp curious dapper daring dark deep distant dusty eager early elegant empty faint fair fancy "
    "fast fierce fluffy foggy fragile fresh frosty gentle giant gilded glossy golden graceful grand gray green "
    "happy hasty heavy hidden hollow honest humble icy ideal jolly keen kind large lazy lively lonely lucky lunar "
    "magic maroon mellow merry mighty misty modern neat nifty nimble noble odd olive pale patient plain polite "
    "proud purple quick quiet rapid rare royal rustic salty scarlet secret shiny silent silver simple sleepy smooth "
    "solar solid spotted steady stormy strong sturdy sunny sweet swift tame tidy tiny tranquil upbeat vast velvet "
    "violet vivid warm wise witty"
).split()
NOUNS = (
    "acorn anchor apple arrow badger bamboo banjo barrel basket beacon beetle blanket blossom bottle bridge bucket "
    "button cabin cactus camel candle canyon carpet castle cellar cherry circus cliff clover compass copper cotton "
    "cricket crystal curtain dagger desert diamond dolphin donkey dragon dresser engine falcon feather fiddle "
    "forest fossil fountain garden glacier goblet guitar hammer harbor hazel helmet heron hill island jacket jaguar "
    "jungle kettle kitten ladder lagoon lantern lemon library lizard lobster locket magnet mango marble market "
    "meadow mirror monkey mountain muffin needle nickel oasis orchard otter oyster paddle palace panther parrot "
    "pebble pepper piano pillow pirate planet pocket potato prairie pumpkin puzzle quarry rabbit raven ribbon river "
    "rocket saddle sailor salmon satchel shadow shovel spider sponge statue temple thunder tiger timber trumpet "
    "tunnel turtle valley village violin wagon walnut whale willow window winter wizard"
).split()
VERBS = (
    "admire arrive bake borrow carve climb collect compare cook cultivate dance decide deliver describe discover "
    "draw enjoy escape explore express finish follow forgive gather gesture guess imagine improve invent invite "
    "juggle jump knit laugh learn listen manage measure mend notice obey observe paint perform polish practice "
    "prepare protect publish question remember repair rescue return search share shiver shout smile stretch study "
    "swim teach travel unpack vanish wander whisper wonder write yawn"
).split()


def singles() -> list[str]:
    """All words, sorted."""
    return sorted({*ADJECTIVES, *NOUNS, *VERBS})


def compounds(chance: random.Random, number: int, joint: str = "-") -> list[str]:
    """Different words such as "amber-falcon"; with a second adjective where so many are needed."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    if number <= pairs // 2:
        return [joint.join(_digits(i, ADJECTIVES, NOUNS)) for i in chance.sample(range(pairs), number)]
    triples = range(len(ADJECTIVES) * pairs)
    return [joint.join(_digits(i, ADJECTIVES, ADJECTIVES, NOUNS)) for i in chance.sample(triples, number)]


def _digits(i: int, *lists: Sequence[str]) -> list[str]:
    words = []
    for choices in reversed(lists):
        i, place = divmod(i, len(choices))
        words.append(choices[place])
    return words[::-1]


def number(chance: random.Random, digits: int = 7) -> str:
    """Without a zero in front."""
    return str(chance.randrange(10 ** (digits - 1), 10**digits))


def identifier(chance: random.Random) -> str:
    """A UUID of version 4."""
    return str(uuid.UUID(int=chance.getrandbits(128), version=4))
