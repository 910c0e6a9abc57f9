"""The vocabulary of the generated tasks: every word here is one token of the bundled `nano` tokenizer."""

import re

NOUNS = tuple(
    """
    acorn almond amber anchor ant anvil apple apron arrow aspen autumn badger bagel balcony bamboo banana banjo barley barn
    barrel basil basket beacon bear beaver bee beetle bell bench berry birch bison blanket boat bonnet book bottle
    boulder bowl branch brass bread brick bridge broom brush bucket butter button cabin cactus camel candle canoe canyon
    carpet carrot castle cedar cello chain chair cheese cherry chess chimney cider circle clam clock cloud clover coal
    cobra coin comet compass copper coral cotton cow crab crane crayon creek cricket crow crown crystal cup curtain
    daisy deer desert desk dolphin donkey door dragon drum duck eagle easel echo eel egg elbow elm ember engine falcon
    fan feather fern ferry fiddle fig finch flag flute forest fork fossil fox frog garden garlic gate geese ghost giant
    ginger glacier glove goat gold goose grape gravel guitar hammer harbor harp hat hawk hazel hedge helmet heron hill
    honey hornet horse igloo ink iris iron island ivory ivy jacket jade jaguar jar jasmine jelly jewel jungle kettle
    kite kiwi koala ladder ladle lagoon lake lamp lantern lava leaf lemon lentil lily lime linen lion lizard llama
    lobster lotus lynx magnet mango maple marble meadow melon mirror mitten moon moose mosaic moth mountain mouse
    mule mushroom nectar needle nest nickel nutmeg oak oasis ocean olive onion opal orange orchid otter owl oyster
    paddle palace panda paper parrot pasta peach peacock pear pearl pebble pelican pencil penguin pepper piano pigeon
    pillow pine pirate planet plum pocket pony poppy potato prism puddle pumpkin quail quartz quilt rabbit radish raft
    rain raven ribbon rice river robin rocket rose ruby saddle sage sail salmon salt sand sapphire satin saw seal shark
    sheep shell shield ship silk silver skate sled slipper snail snow sofa spear spider spoon spruce squid stable star
    statue stone storm straw sugar sun swan sword table tailor tea temple thistle thunder tiger tomato torch tower train
    tulip tunnel turtle umbrella valley vase velvet violet violin wagon walnut walrus waterfall whale wheat wheel willow
    window wolf wood wool wren yak yarn zebra zinc
    """.split()
)

ADJECTIVES = tuple(
    """
    old young quiet loud bright dark warm cold small large narrow wide heavy light early late slow quick smooth rough
    gentle proud lonely busy empty full distant near hollow sharp plain rare pale deep shallow dusty clean broken
    hidden open closed round green blue red yellow white black gray brown
    """.split()
)

VERBS = tuple(
    """
    watched found carried followed passed reached painted crossed guarded lifted moved touched opened closed counted
    cleaned covered visited admired forgot remembered repaired borrowed returned measured described noticed chased
    avoided welcomed
    """.split()
)

OTHER_WORDS = tuple(
    """
    a an and after again all always at away before behind below beside but by during each every facts for from
    had has have in into is it many near never no not of on or over past program question run several some
    still text that the then there these they this through to today toward under until value variables was were when which
    while with without yesterday
    Answer Follow Question Remember Run VAR The This modulo
    """.split()
)

PUNCTUATION = (".", ",", ";", ":", "?", "!", " =", " <-", " +", " -", " *", " :", "\n", " ")

PIECE = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s")
NUMBERS = tuple(str(n) for n in range(1000))


def vocabulary() -> list[str]:
    """All pieces of task text that are single tokens: words and numbers with and without a leading space, punctuation."""
    words = sorted({*NOUNS, *ADJECTIVES, *VERBS, *OTHER_WORDS})
    spaced = [f" {word}" for word in (*words, *NUMBERS)]
    bare = [word for word in words if word in OTHER_WORDS]
    return [piece for piece in dict.fromkeys((*PUNCTUATION, *spaced, *bare)) if len(piece) > 1]


def count_words(text: str) -> int:
    """Tokens that `nano` needs for task text, counted without its tokenizer (every word of the tasks is one token)."""
    return len(PIECE.findall(text))
