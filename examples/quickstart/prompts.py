"""The prompts: a simple request plus one or two rules, and worked examples of obeying those rules.

Everything follows from `SEED`; no model is involved. `examples` renders what a perfect answer looks like, which two of
the sources see before the question (few-shot prompting).
"""

import json
import random
from typing import Any

from rules import INSTRUCTIONS, instruction

SEED = 20
COUNT = 208
SINGLE = 120

KINDS = tuple(INSTRUCTIONS)
# Pairs of rules that do not contradict each other ("all capitals" and a JSON key in small letters would).
PAIRS = [
    *[("lowercase", kind) for kind in ("bullets", "no_commas", "keywords", "quotes", "json", "one_sentence")],
    *[("uppercase", kind) for kind in ("bullets", "no_commas", "keywords", "quotes", "one_sentence")],
    *[("bullets", kind) for kind in ("no_commas", "keywords")],
    *[("end_with", kind) for kind in ("start_with", "no_commas", "keywords")],
    *[("start_with", kind) for kind in ("no_commas", "keywords", "one_sentence")],
    *[("json", kind) for kind in ("no_commas", "keywords")],
    *[("quotes", kind) for kind in ("no_commas", "one_sentence")],
]
REQUESTS = (
    "Describe {}.",
    "Tell me about {}.",
    "Why do people like {}?",
    "What is special about {}?",
    "Say something nice about {}.",
    "What should a child know about {}?",
)
TOPIC_LIST = (
    "cats;dogs;horses;owls;bees;whales;dolphins;penguins;elephants;spiders;butterflies;turtles;apples;oranges;bananas;"
    "tomatoes;potatoes;cheese;honey;chocolate;coffee;tea;soup;pizza;rice;the sea;the moon;the sun;stars;rain;snow;wind;"
    "clouds;thunder;mountains;rivers;deserts;forests;islands;volcanoes;spring;summer;autumn;trees;roses;grass;gardens;"
    "bridges;castles;lighthouses;libraries;museums;schools;markets;kitchens;trains;boats;bicycles;planes;balloons;"
    "clocks;mirrors;candles;lamps;books;letters;maps;pencils;paintings;photographs;songs;drums;pianos;guitars;dancing;"
    "swimming;running;hiking;fishing;camping;chess;football;tennis;puzzles;kites;toys;birthdays;weddings;holidays;"
    "families;friends;neighbours;teachers;doctors;farmers;bakers;sailors;astronauts;robots;computers;telephones;cameras"
)
TOPICS = TOPIC_LIST.split(";")
STARTS = ("Clearly", "Honestly", "Well", "Today", "Indeed", "Sure")
ENDS = ("That is all.", "The end.", "Have a nice day.", "I hope this helps.")
KEYWORDS = ("river", "golden", "winter", "music", "friend", "garden", "simple", "bright", "window", "morning")
KEYS = ("answer", "text", "fact", "note")

# Facts for the worked examples: on topics that no prompt has, without commas, at most 8 words each.
FACTS = {
    "bread": ("Bread is made from flour and water.", "It smells wonderful.", "People eat it every day.", "It is soft."),
    "lions": (
        "Lions live together in large groups.",
        "They hunt at night.",
        "They have loud roars.",
        "They sleep a lot.",
    ),
    "paper": ("Paper is made from wood.", "We write on it.", "It folds easily.", "It burns quickly."),
    "milk": ("Milk comes from cows and goats.", "It is white.", "Children drink it often.", "It makes bones strong."),
}


def make_rule(kind: str, rng: random.Random) -> dict[str, Any]:
    """A rule of `kind` with its parameters drawn from `rng`."""
    rule: dict[str, Any] = {"kind": kind}
    if kind == "bullets":
        rule["n"] = rng.choice((2, 3, 4))
    elif kind == "one_sentence":
        rule["n"] = rng.choice((8, 10, 12))
    elif kind == "start_with":
        rule["word"] = rng.choice(STARTS)
    elif kind == "end_with":
        rule["phrase"] = rng.choice(ENDS)
    elif kind == "keywords":
        rule["first"], rule["second"] = rng.sample(KEYWORDS, 2)
    elif kind == "json":
        rule["key"] = rng.choice(KEYS)
    return rule


def make_prompts() -> list[dict[str, Any]]:
    """All prompts, sorted by prompt_id: `prompt_id`, `prompt`, `domain`, `meta.rules`."""
    rng = random.Random(SEED)
    subjects = [(request, topic) for topic in TOPICS for request in rng.sample(REQUESTS, 3)]
    rng.shuffle(subjects)
    combos = [(KINDS[i % len(KINDS)],) for i in range(SINGLE)]
    combos += [PAIRS[i % len(PAIRS)] for i in range(COUNT - SINGLE)]
    rng.shuffle(combos)
    prompts = []
    for index, (combo, (request, topic)) in enumerate(zip(combos, subjects)):
        rules = [make_rule(kind, rng) for kind in combo]
        text = " ".join([request.format(topic), *map(instruction, rules)])
        prompts.append(
            {"prompt_id": f"quick-{index:04d}", "prompt": text, "domain": "instruction", "meta": {"rules": rules}}
        )
    return prompts


def perfect_answer(rules: list[dict[str, Any]], topic: str) -> str:
    """A text about one of FACTS that obeys all of `rules`."""
    by_kind = {rule["kind"]: rule for rule in rules}
    facts = list(FACTS[topic])
    if "keywords" in by_kind:
        rule = by_kind["keywords"]
        facts[0] = f"{topic.capitalize()} and {rule['first']} and {rule['second']} go well together."
    if "bullets" in by_kind:
        text = "\n".join(f"- {fact}" for fact in facts[: by_kind["bullets"]["n"]])
    else:
        text = facts[0] if "one_sentence" in by_kind else " ".join(facts[:2])
    if "start_with" in by_kind:
        text = f"{by_kind['start_with']['word']} {text[0].lower()}{text[1:]}"
    if "end_with" in by_kind:
        text = f"{text} {by_kind['end_with']['phrase']}"
    if "lowercase" in by_kind:
        text = text.lower()
    if "uppercase" in by_kind:
        text = text.upper()
    if "quotes" in by_kind:
        text = f'"{text}"'
    return json.dumps({by_kind["json"]["key"]: text}) if "json" in by_kind else text


def examples(prompt: dict[str, Any], count: int) -> list[dict[str, str]]:
    """`count` worked examples (user and assistant messages) with the prompt's kinds of rules, parameters drawn anew."""
    rng = random.Random(f"{SEED} {prompt['prompt_id']}")
    messages = []
    for topic in rng.sample(sorted(FACTS), count):
        rules = [make_rule(rule["kind"], rng) for rule in prompt["meta"]["rules"]]
        text = " ".join([rng.choice(REQUESTS).format(topic), *map(instruction, rules)])
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": perfect_answer(rules, topic)}]
    return messages
