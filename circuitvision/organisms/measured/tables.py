"""What was measured as Markdown for a card: short tables, each under a sentence that tests its numbers before it says what they show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from circuitvision.organisms.measured.answers import COLUMNS, MARGIN
from circuitvision.organisms.measured.depth import ATTRIBUTES
from circuitvision.organisms.measured.heads import EFFECT, LOWER, TOWERS, WANTED

Measured = Mapping[str, Any]
NOTHING = "–"


def markdown(found: Measured) -> str:
    """All tables, under headings of the third level."""
    parts = [
        ("Without vision attention", *answers(found)),
        ("Single heads", *heads(found)),
        ("Heads together", *groups(found)),
        ("What is read at an object's patches", *depth(found)),
        ("Parts of the picture, from clean into corrupt", *restored(found)),
        ("Parts of the picture, removed", *removed(found)),
    ]
    return "\n\n".join(f"### {title}\n\n{sentence}\n\n{rows}" for title, sentence, rows in parts) + "\n"


def answers(found: Measured) -> tuple[str, str]:
    """Accuracy by kind of question, ablated and guessed."""
    kinds, condition = found["answers"]["kinds"], found["conditions"]["vision attention"]
    above = condition["above_guess"]
    far = [f"{kind} ({short(value, sign=True)})" for kind, value in above.items() if not value <= MARGIN]
    start = "With all vision attention at its mean (of every position, over other scenes), accuracy"
    if far:
        sentence = f"{start} stays more than {short(MARGIN)} above the guess from the text: {', '.join(far)}."
    else:
        most = max(above, key=above.__getitem__)
        sentence = (
            f"{start} is at most {short(MARGIN)} above the guess from the text, in every kind "
            f"(the most: {most}, {short(above[most], sign=True)})."
        )
    sentence += f" Over all kinds together that is {short(sum(above.values()) / len(above), sign=True)}."
    rows = [[kind, *(cell(row[name]) for name in COLUMNS), str(row["intact"]["n"])] for kind, row in kinds.items()]
    return sentence, table(["questions", *COLUMNS, "n"], rows)


def heads(found: Measured) -> tuple[str, str]:
    """Every head that counts in some kind of question, with its effects in all of them."""
    kinds, condition = found["heads"]["kinds"], found["conditions"]["heads"]
    numbers = {tower: len(condition["heads"][tower]) for tower in TOWERS}
    said = " and ".join(f"{number} in the {tower} tower" for tower, number in numbers.items())
    verdict = "as many as wanted" if condition["met"] else f"fewer than the {WANTED} of each tower that were wanted"
    sentence = (
        f"Heads that restore at least {short(EFFECT)} of the answer alone (lower bound above {short(LOWER)}), in some kind of question: "
        f"{said}, {verdict}. Shares of the logit difference, clean into corrupt, {sizes(kinds)}."
    )
    effects = {kind: {entry["head"]: entry for entry in told["single"]} for kind, told in kinds.items()}
    shown = [head for own in effects.values() for head in own]
    counted = {head for tower in TOWERS for head in condition["heads"][tower]}
    rows = [
        [head, *(cell(effects[kind].get(head)) for kind in kinds)] for head in dict.fromkeys(shown) if head in counted
    ]
    return sentence, table(["head", *kinds], rows)


def groups(found: Measured) -> tuple[str, str]:
    """Joint effects of a layer's and of a tower's heads, with their interaction."""
    kinds = found["heads"]["kinds"]
    own = {kind: {entry["group"]: entry for entry in told["groups"]} for kind, told in kinds.items()}
    names = [name for name in dict.fromkeys(name for one in own.values() for name in one) if "strongest" not in name]
    layers = [(kind, entry) for kind, one in own.items() for name, entry in one.items() if " L" in name]
    more = [(kind, entry) for kind, entry in layers if entry["interaction"]["low"] > 0]
    less = [(kind, entry) for kind, entry in layers if entry["interaction"]["high"] < 0]
    sentence = f"{_clear(more, 'more', max)} {_clear(less, 'less', min)} In brackets: joint effect minus the sum alone."
    rows = [[name, *(_joint(own[kind].get(name)) for kind in kinds)] for name in names]
    return sentence, table(["heads", *kinds], rows)


def _clear(entries: Sequence[tuple[str, Any]], word: str, choose: Any) -> str:
    if not entries:
        return f"No layer's heads do clearly {word} together than the sum of what they do alone."
    kind, most = choose(entries, key=lambda entry: entry[1]["interaction"]["value"])
    places = "layer and kind" if len(entries) == 1 else "layers and kinds"
    return (
        f"In {len(entries)} {places} the heads do clearly {word} together than the sum of what they do alone "
        f"(the farthest: {most['group']}, {kind}, {short(most['interaction']['value'], sign=True)})."
    )


def _joint(entry: Any) -> str:
    if entry is None or math.isnan(entry["value"]):
        return NOTHING
    inner = entry["interaction"]
    return (
        f"{short(entry['value'])} ({short(inner['value'], sign=True)} [{short(inner['low'])}, {short(inner['high'])}])"
    )


def depth(found: Measured) -> tuple[str, str]:
    """Lens and probe by site and kind of patch."""
    rows = {(row["site"], row["patch"], row["attribute"]): row for row in found["depth"]["rows"]}
    sites = list(dict.fromkeys(site for site, _, _ in rows))
    vision = [site for site in sites if site.startswith("vision.")]
    first, last = (rows[site, "wedge", "shape"]["probe"] for site in (vision[0], vision[-1]))
    change = "rises" if last["low"] > first["high"] else "does not clearly rise"
    sentence = (
        f"What a probe reads of the shape at the patch that shows the colour {change} through the vision tower: {cell(first)} where it begins, "
        f"{cell(last)} where it ends. Each cell: lens / probe, chance .12 ({found['depth']['tested on']} scenes with held-out pairs; control: "
        "the higher of colour and shape at another object's patches)."
    )
    columns = [(patch, attribute) for patch in ("wedge", "outline") for attribute in ATTRIBUTES]
    lines = []
    for site in sites:
        own = [f"{short(row['lens']['value'])} / {short(row['probe']['value'])}" for row in _of(rows, site, columns)]
        control = _of(rows, site, [(f"other {patch}", attribute) for patch, attribute in columns])
        both = [max(row[method]["value"] for row in control) for method in ("lens", "probe")]
        lines.append([f"`{site}`", *own, f"{short(both[0])} / {short(both[1])}"])
    return sentence, table(["site", *(f"{patch}: {attribute}" for patch, attribute in columns), "control"], lines)


def _of(rows: Mapping[Any, Any], site: str, columns: Iterable[tuple[str, str]]) -> list[Any]:
    return [rows[site, patch, attribute] for patch, attribute in columns]


def restored(found: Measured) -> tuple[str, str]:
    """What single parts of the clean picture bring back, where its pixels differ."""
    kinds = found["regions"]["kinds"]
    own = kinds["shape"]["regions"]
    singles = [own[name]["restored"]["value"] for name in own if name.startswith("outline,") and name != "outline, all"]
    sentence = "Pixels differ in the changed object alone; other parts bring back nothing by construction."
    if own and not any(map(math.isnan, singles)):
        whole = own["outline, all"]["restored"]["value"]
        relation = "less than" if sum(singles) < whole else "at least as much as"
        sentence += (
            f" Of the shape, single patches with outline bring back {', '.join(map(short, singles))}: together {short(sum(singles))}, {relation} "
            f"the three at once ({short(whole)})."
        )
    names = _names(kinds)
    differing = [name for name in names if any(_there(told, name, "differs") > 0 for told in kinds.values())]
    rows = [
        [
            name,
            *(
                cell(told["regions"][name]["restored"]) if _there(told, name, "differs") > 0 else NOTHING
                for told in kinds.values()
            ),
        ]
        for name in differing
    ]
    return sentence, table(["patches", *kinds], rows)


def removed(found: Measured) -> tuple[str, str]:
    """What is lost where a part of the clean picture becomes background."""
    kinds = found["regions"]["kinds"]
    names = [name for name in _names(kinds) if name not in ("background", "everything")]
    worst = {
        kind: max(told["regions"], key=lambda name: -told["regions"][name]["right after removal"], default="")
        for kind, told in kinds.items()
        for told in [{"regions": {name: told["regions"][name] for name in names if name in told["regions"]}}]
    }
    said = [
        f"{kind}: {name} ({short(kinds[kind]['regions'][name]['right after removal'])} stay right)"
        for kind, name in worst.items()
        if name
    ]
    sentence = (
        "Patches of the clean picture become background: the loss of the logit difference as a share of the difference of the pair, and the share "
        f"of answers that stay right. The most costly: {'; '.join(said) or NOTHING}."
    )
    rows = [[name, *(_lost(told["regions"].get(name)) for told in kinds.values())] for name in names]
    return sentence, table(["patches", *kinds], rows)


def _lost(entry: Any) -> str:
    return NOTHING if entry is None else f"{short(entry['removed']['value'])}, {short(entry['right after removal'])}"


def _names(kinds: Measured) -> list[str]:
    return list(dict.fromkeys(name for told in kinds.values() for name in told["regions"]))


def _there(told: Any, name: str, field: str) -> float:
    return told["regions"].get(name, {}).get(field, 0.0)


# -- words ---------------------------------------------------------------------------------------------------------------------------------------


def sizes(kinds: Measured) -> str:
    """How many pairs of each kind were answered right."""
    return "pairs: " + ", ".join(f"{kind} {told['n']}" for kind, told in kinds.items())


def short(value: float, sign: bool = False) -> str:
    """Two decimals without the zero before the point."""
    if math.isnan(value):
        return NOTHING
    text = f"{value:+.2f}" if sign else f"{value:.2f}"
    text = text.replace("0.", ".", 1) if abs(value) < 0.995 else text
    return text.replace("-.00", ".00")


def cell(entry: Any) -> str:
    """A number with its interval."""
    if entry is None or math.isnan(entry["value"]):
        return NOTHING
    return f"{short(entry['value'])} [{short(entry['low'])}, {short(entry['high'])}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
