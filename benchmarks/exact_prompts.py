"""The prompts that exact mode is measured on: four of each set, small enough to be read.

Chat, a passage to summarise or quote, code, and the openings of four articles to go on with: the first of the
WikiText-103 test text that are plain ASCII and have 500 characters, cut after a sentence, as they stand there
(Wikipedia, CC BY-SA 3.0, as is the passage).
"""

_PASSAGE = (
    "The Antikythera mechanism is an ancient Greek hand-powered model of the Solar System, described as the "
    "oldest known example of an analogue computer. It could be used to predict astronomical positions and "
    "eclipses decades in advance. It could also be used to track the four-year cycle of athletic games similar to "
    "an Olympiad, the cycle of the ancient Olympic Games. The artefact was among wreckage retrieved from a "
    "shipwreck off the coast of the Greek island Antikythera in 1901. In 1902, it was identified by archaeologist "
    "Spyridon Stais as containing a gear. The device, housed in the remains of a wooden-framed case of uncertain "
    "overall size, was found as one lump, later separated into three main fragments which are now divided into 82 "
    "separate fragments after conservation efforts."
)
_CODE = """def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def variance(values):
    centre = mean(values)
    total = 0.0
    for value in values:
        total += (value - centre) ** 2
    return total / len(values)
"""

_OPENINGS = (
    (
        "Robert Boulter is an English film , television and theatre actor . He had a guest @-@ starring role on the"
        " television series The Bill in 2000 . This was followed by a starring role in the play Herons written by "
        "Simon Stephens , which was performed in 2001 at the Royal Court Theatre . He had a guest role in the "
        'television series Judge John Deed in 2002 . In 2004 Boulter landed a role as " Craig " in the episode " '
        "Teddy 's Story \" of the television series The Long Firm ; he starred alongside actors Mark Strong and "
        "Derek Jacobi ."
    ),
    (
        '" Kiss You " is a song recorded by English @-@ Irish boy band One Direction for their second studio album '
        ", Take Me Home ( 2012 ) . It was released as the record 's second single in Germany and the third overall "
        "single on 7 January 2013 . The song was composed by Kristoffer Fogelmark , Kristian Lundin , Albin Nedler "
        ', Savan Kotecha , Shellback and its producers , Carl Falk and Rami Yacoub . " Kiss You " is an upbeat '
        "power pop song with electronic effects ; the lyrics detail a protagonist 's infatuation with a significant"
        " other ."
    ),
    (
        "The 1933 Treasure Coast hurricane was the second @-@ most intense tropical cyclone to strike the United "
        "States during the active 1933 Atlantic hurricane season . The eleventh tropical storm , fifth hurricane , "
        "and the third major hurricane of the season , it formed east @-@ northeast of the Leeward Islands on "
        "August 31 . The tropical storm moved rapidly west @-@ northwestward , steadily intensifying to a hurricane"
        " ."
    ),
    (
        "The Second Battle of Naktong Bulge was an engagement between United Nations ( UN ) and North Korean ( NK )"
        " forces early in the Korean War from September 1 to September 15 , 1950 , along the Naktong River in South"
        " Korea . It was a part of the Battle of Pusan Perimeter , and was one of several large engagements fought "
        "simultaneously ."
    ),
)

SETS: dict[str, tuple[str, ...]] = {
    "chat": (
        "What is the capital of France, and what is it known for?",
        "Give me three tips for sleeping better.",
        "Explain to a child why the sky is blue.",
        "Write a short poem about the sea.",
    ),
    "summary": (
        f"Summarise this passage in three sentences:\n\n{_PASSAGE}",
        f"List the facts in this passage, one per line:\n\n{_PASSAGE}",
        f"Correct the spelling of this passage and repeat it:\n\n{_PASSAGE}",
        f"What was found in 1901 and in 1902? Quote the passage.\n\n{_PASSAGE}",
    ),
    "code": (
        f"Add type annotations to this Python code:\n\n{_CODE}",
        f"Rename total to accumulated in this Python code:\n\n{_CODE}",
        f"Write a function standard_deviation in the style of this Python code:\n\n{_CODE}",
        "Write a Python function that reverses a linked list.",
    ),
    "continuation": _OPENINGS,
}

TEXTS = ("continuation",)
"""Sets of texts to go on with; the others are what a user says."""
