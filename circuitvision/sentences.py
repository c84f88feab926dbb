"""The one place where a finding becomes a sentence: a function per claim, which affirms only what holds.

Where a finding does not hold, its sentence gives the numbers and, where it has one, the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuitvision.findings import LEAST_SHARE, NOT_ASKED, percent
from circuitvision.model.names import is_component

if TYPE_CHECKING:
    from circuitvision.findings import Finding


def _say_answers(found: Finding) -> str:
    about = found.about
    said = f"{about['clean']!r} on the clean image and {about['corrupt']!r} on the corrupt one"
    verb = about["verb"]
    if found.holds:
        return f"The model {verb} {said}."
    if found.reason == NOT_ASKED:
        return f"The model does not give the answers asked about ({about['answer']!r}, {about['foil']!r}): it {verb} {said}."
    return f"The model's answers are hardly above chance: it {verb} {said}, with {found.value:.1%} where guessing gives {found.chance:.1%}."


def _say_swing(found: Finding) -> str:
    said = f"Swapping one image for the other moves the metric by {found.amount} ({found.sure})"
    if found.holds:
        return f"{said}."
    return f"{said}: {found.reason}{', so no share of it is given' if 'hardly' in found.reason else ''}."


def _say_share(found: Finding) -> str:
    subject, verb = _capital(found.about["subject"]), "restores" if found.about["mode"] == "denoise" else "destroys"
    alone, plural = ("together", True) if found.claim == "heads" else ("alone", False)
    if found.value != found.value:
        return f"What {found.about['subject']} {'do' if plural else 'does'} {alone} has no share: {found.reason}."
    if found.holds:
        return f"{subject} {alone} {verb[:-1] if plural else verb} {found.amount} of that ({found.sure})."
    moved = f"{subject} {alone} {'move' if plural else 'moves'} {found.amount} of that ({found.sure})"
    # What the whole comparison lacks is said once, of the whole.
    return f"{moved}: {found.reason}." if found.reason.startswith("it ") else f"{moved}."


_BY_METHOD = {
    "patch": "patched alone",
    "zero": "set to zero",
    "mean": "put at its mean",
    "resample": "put at another example's value",
    "attribution": "patched alone would, to first order,",
    "direct": "by its direct path alone",
    "information_gain": "put at its mean",
}


def _say_largest_effect(found: Finding) -> str:
    about = found.about
    verb = "move" if about["method"] == "attribution" else "moves"
    said = f"{_capital(about['subject'])} {_BY_METHOD[about['method']]} {verb} {about['metric']} by {found.amount} ({found.sure})"
    return f"{said}, the most of {about['count']}{'' if found.holds else f': {found.reason}'}."


def _say_past(found: Finding) -> str:
    heads, tower = found.about["heads"], found.about["tower"]
    towers = f"{tower} tower{'s' if ' and ' in tower else ''}"
    said = f"No single head of the {towers} moves {LEAST_SHARE:.0%}: with {heads} of them held at the corrupt run's values, "
    return (
        f"{said}{found.amount} of the image's effect still reaches the answer{found.about['through']}."
        if found.holds
        else ""
    )


def _say_back_up(found: Finding) -> str:
    many, verb = found.about["subject"], "restore" if found.about["mode"] == "denoise" else "destroy"
    return f"No head alone {verb}s more than {found.about['alone']} of that; {many} together {verb} {found.amount} ({found.sure})."


def _say_at_answer(found: Finding) -> str:
    about = found.about
    both = f"{about['answer']!r} or {about['foil']!r}"
    if not found.holds:
        return f"{both} cannot be read {about['place']}: {found.reason}"
    since = "the input" if about["layer"] == "input" else f"{about['tower']} layer {about['layer']}"
    return f"{both} can be read {about['place']} from {since} on"


def _say_patches(found: Finding) -> str:
    return f"at {found.value:.0%} of image patches and layers" if found.holds else "at no image patch"


def _say_carries(found: Finding) -> str:
    beside = "" if found.chance is None else f"; as many random heads cost {found.number(found.chance)}"
    said = f"Ablating {found.about['heads']} together costs {found.amount} of the pairs right ({found.sure}){beside}"
    return f"{said}." if found.holds else f"{said}: {found.reason}."


def _say_attends(found: Finding) -> str:
    head, to = found.about["head"], found.about["to"]
    if found.holds is False:
        kind = "layer" if head.startswith("Layer") else "head"
        head = head.replace("Layer", "layer", 1)
        most = f"{percent(found.value)} beside {percent(found.chance or 0.0)}"
        if found.reason.startswith("other places"):
            return f"No head singles {to} out: at most {head}, {most} by chance, and other places get nearly as much"
        return f"No {kind} gives {to} much more attention than chance: at most {head}, {most}"
    return _say_attends_too(found)


def _say_attends_too(found: Finding) -> str:
    head = found.about["head"]
    if found.value != found.value:
        return f"{head} has no attention to show"
    return f"{head} gives {found.about['said']} of its attention to {found.about['to']}"


def _say_rolls_out(found: Finding) -> str:
    layer, to = found.about["head"], found.about["to"]
    if found.holds is False:
        share, alike = found.about["said"], percent(found.chance or 0.0)
        return (
            f"No clear excess: rolled out to layer {layer}, {share} comes from {to}, where all keys alike give {alike}"
        )
    return f"Rolled out to layer {layer}, {found.about['said']} comes from {to}"


def _say_differs(found: Finding) -> str:
    head, to, said = found.about["head"], found.about["to"], found.about["said"]
    way = "more" if found.value >= 0 else "less"
    if found.holds:
        return f"{head} gives {to} {said} {way} attention than the mean head"
    return f"No clear difference from the mean head: {head}, {said} {way} attention to {to}"


def _say_looks_near(found: Finding) -> str:
    if found.holds is None:
        return f"No patch of the {found.about['tower']} tower looks at patches"
    where = f"patches look {found.value:.1f} patches far in layer {found.about['layer']}"
    if found.holds:
        return f"{where[0].upper()}{where[1:]}, where looking at all alike is {found.chance:.1f}"
    return f"No layer looks much nearer than all patches alike: {where}, beside {found.chance:.1f}"


def _say_adds(found: Finding) -> str:
    if found.holds is None:
        return "No patch has a contrast"
    if found.holds:
        return f"The question adds most attention at patch {found.about['at']}"
    return f"No patch stands out in what the question adds; the highest is {found.about['at']}"


def _say_strongest_at(found: Finding) -> str:
    about = found.about
    if found.holds:
        return f"{about['tower']}: {about['name']} is strongest at {about['at']}"
    return f"No patch stands out for {about['name']} ({about['tower']}); the highest is at {about['at']}"


def _say_narrow(found: Finding) -> str:
    head = found.about["head"]
    return (
        f"{head} has the narrowest attention"
        if found.holds
        else f"No head is narrow; {head} has the narrowest attention"
    )


def _say_peaks(found: Finding) -> str:
    head, rate = found.about["head"], f"{found.value:.0%} of examples"
    if found.holds:
        return f"{head} peaks inside the region in {rate}"
    return f"No head peaks inside the region more often than by chance: {head} in {rate}"


def _say_explained(found: Finding) -> str:
    head, share = found.about["head"], f"{found.value:.0%}"
    if found.holds:
        return f"Where the patch lies explains {share} of the attention of {head}"
    return f"Where the patch lies explains no head's attention: {share} of that of {head}"


def _say_promotes(found: Finding) -> str:
    vector, word, value = (
        found.about["vector"],
        found.about["word"],
        f"{found.value:+.2f}".replace("-", "\N{MINUS SIGN}"),
    )
    verb = "promotes" if found.value >= 0 else "suppresses"
    if found.holds:
        return f"{vector} {verb} {word} most strongly: {value}"
    return f"No value vector stands out: the strongest is {vector}, {value} for {word}; the median one has {found.chance:.2f}"


def _say_among(found: Finding) -> str:
    about = found.about
    return f"{found.value:.0f} of the {about['asked']} outputs asked for are among the {about['kept']} of {about['vector']}"


def _say_stands_out(found: Finding) -> str:
    about = found.about
    if found.holds:
        return f"{about['method']}: {about['noun']} {about['at']} matters most to {about['metric']}"
    if found.value != found.value:
        return f"{about['method']}: no {about['noun']} matters to {about['metric']}"
    return f"{about['method']}: no {about['noun']} stands out for {about['metric']}; the largest is {about['at']}, {found.value:.1f} times the median"


def _say_on_object(found: Finding) -> str:
    if found.n == 1:
        return f"{found.about['method']} peaks {'on' if found.value else 'beside'} the object"
    said = f"{found.about['hits']} of {found.n} maps peak on the object"
    return said if found.holds else f"{said}, which is no more than chance gives"


def _say_ranks_first(found: Finding) -> str:
    about = found.about
    said = f"At {about['where']} the {about['tower']} ranks {about['word']!r} first"
    return f"{said}, by no more than {found.amount}" if found.holds is False else f"{said} {about['since']}"


_AGREEING = {
    "key_value_agreement": "promotes the true class",
    "compositionality": "promotes what the layer answers",
}


def _say_points(found: Finding) -> str:
    verb = "point at the classes" if found.holds else "point at the classes no more than random rows do"
    beside = f"{found.value:.2f} beside {found.chance:.2f} by chance, p = {found.about['p']}"
    return f"Layer {found.about['layer']}'s value vectors {verb}: {beside}"


def _say_composes(found: Finding) -> str:
    about = found.about
    if "pair" not in about:
        return "No pair of heads has a score"
    score = f"{found.value:+.2f}".replace("-", "\N{MINUS SIGN}")
    if found.holds is False:
        said = f"No pair stands out from random heads in {about['kind']}-composition"
        return f"{said}; the first is {about['pair']}, {score}"
    above = " above random heads" if found.holds else ""
    return f"{about['pair']} composes most through {about['kind']}: {score}{above}"


def _say_ranks_at(found: Finding) -> str:
    about = found.about
    if found.holds:
        return f"The {about['tower']} ranks {about['name']!r} first, highest at {about['at']}"
    return f"No patch stands out in what the {about['tower']} ranks first; the highest is {about['name']!r} at {about['at']}"


def _say_agrees(found: Finding) -> str:
    what = _AGREEING.get(found.about["measure"], "is above chance")
    at = f"most at {found.about['kind']} of layer {found.about['layer']}: {found.value:.0%}, by chance {found.chance:.0%}"
    return (
        f"What is active {what}, {at}"
        if found.holds
        else f"No layer's active neurons show that what is active {what}; {at}"
    )


def _say_steers(found: Finding) -> str:
    about = found.about
    said = f"{found.value:+.2g}".replace("-", "\N{MINUS SIGN}")
    moved = f"{about['set']} moves {about['metric']} by {said} per {about['unit']}"
    beside = "" if found.chance is None else f", {about['draws']} {about['controls']} by {found.chance:.2g} at most"
    if found.holds is not False:
        return f"{moved}{beside}"
    return f"No clear steering by {about['set']}: {said} per {about['unit']}{beside} ({found.reason})"


def _say_separates(found: Finding) -> str:
    about = found.about
    if not found.holds:
        return f"No clear direction “{about['name']}”: {found.reason}"
    cosine = about["cosine"].replace("-", "\N{MINUS SIGN}")
    return f"{found.value:.0%} of held-out examples lie on their side of “{about['name']}”, halves agree by cosine {cosine}"


def _say_injects(found: Finding) -> str:
    about = found.about
    beside = "" if found.chance is None else f", {about['control']} {_two_digits(found.chance)}"
    if found.holds:
        return f"{_capital(about['region'])} carries the source run over: β {_two_digits(found.value)}{beside}"
    return f"No region clearly carries the source run over: {about['region']} has β {_two_digits(found.value)}{beside}"


def _say_listens(found: Finding) -> str:
    about = found.about
    said = f"β {about['of right']} under “{about['right']}”, {about['of other']} under “{about['other']}”"
    return f"It goes where the prompt says: {said}" if found.holds else f"It does not follow the prompt: {said}"


def _say_succeeds(found: Finding) -> str:
    about = found.about
    said = f"“{about['condition']}” succeeds in {percent(found.value)} of episodes, “{about['control']}” in {percent(found.chance or 0.0)}"
    return said if found.holds else f"No clear difference in success: {said}"


_ACT_ON = {"backup": "back each other up", "cooperation": "need each other", "opposition": "work against each other"}


def _say_interact(found: Finding) -> str:
    about = found.about
    if found.holds is None:
        return f"No interaction to see: {found.reason}"
    effects = f"together {about['together']}, alone {about['alone']}"
    if about["rest"] == "intact":
        effects = f"taking both away costs {about['together']}, one of them {about['alone']}"
    said = (
        f"{about['pair']} {_ACT_ON[about['kind']]}: "
        if found.holds
        else f"No two components clearly interact: {about['pair']}, "
    )
    return f"{said}{effects}{'' if found.holds else f' ({found.reason})'}".replace("-", "\N{MINUS SIGN}")


def _say_modulates(found: Finding) -> str:
    about = found.about
    said = f"{about['heads']} heads rescaled by their scores: {about['metric']} {about['before']} before, {about['after']} after"
    beside = "" if found.chance is None else f"; {about['draws']} random sets move it by {found.chance:.2g} at most"
    return f"{said}{beside}{f' ({found.reason})' if found.holds is False else ''}".replace("-", "\N{MINUS SIGN}")


def _say_reads_background(found: Finding) -> str:
    about = found.about
    gains = f"information gain {about['gain']} with it, {about['left']} nat without".replace("-", "\N{MINUS SIGN}")
    if found.holds:
        return f"Without {about['head']} the background counts {about['share']} less ({gains})"
    return f"No head clearly lets the background in: {about['head']} comes first, {gains} ({found.reason})"


def _say_raises_worst(found: Finding) -> str:
    about = found.about
    heads = "1 head" if about["count"] == "1" else f"{about['count']} heads"
    if about["count"] == "0":
        return f"Removing heads does not raise the worst group, {about['before']}"
    said = f"Removing {heads} takes the worst group from {about['before']} to {about['after']}"
    if about["after"] == about["before"]:
        said = f"Removing {heads} leaves the worst group at {about['before']}"
    beside = f"; as many others: {about['random']} at best" if about["random"] else ""
    return f"{said}{beside}{f' ({found.reason})' if found.holds is False else ''}"


def _say_repairs(found: Finding) -> str:
    about = found.about
    if found.holds is None:
        return f"No self-repair to see: {found.reason}"
    effects = f"taking it away costs {about['before']}, and {about['after']} without {about['other']}".replace(
        "-", "\N{MINUS SIGN}"
    )
    if found.holds:
        return f"{_capital(about['one'])} steps in for {about['other']}: {effects}"
    return f"No component clearly steps in for another: of {about['one']} {effects} ({found.reason})"


def _say_interchanges(found: Finding) -> str:
    about = found.about
    many = "1 dimension" if about["k"] == "1" else f"{about['k']} dimensions"
    if found.holds:
        verb = "carries" if about["k"] == "1" else "carry"
        return (
            f"{many} of {about['site']} {verb} the answer: interchange gives the other one in {found.amount} of pairs"
        )
    return (
        f"{many} of {about['site']}: interchange gives the other answer in {found.amount} of pairs, and {found.reason}"
    )


def _say_understands(found: Finding) -> str:
    about = found.about
    others = f"edits of other objects move {about['ID']} of the answers" if about["ID"] else ""
    if found.holds is None:
        return _capital(f"edits of what is not asked about move {found.amount} of the answers ({found.sure})")
    seen = f"right before and after the edit in {found.amount} ({found.sure})"
    if found.holds:
        return f"The answers follow what is seen: {seen}{f', and {others}' if others else ''}"
    if found.reason == "the answer stays the same":
        return f"The answers do not follow the picture: the same before and after the edit in {about['SB']}, {seen}"
    return _capital(f"{seen}{f'; {others}' if others else ''}")


def _say_calibrates(found: Finding) -> str:
    about = found.about
    if found.holds is None:
        return f"The prior alone gives {found.amount} of the answers ({found.sure})"
    said = f"right answers go from {about['before']} to {about['after']}, a change of {found.amount} ({found.sure})"
    if found.holds:
        return f"Taking the language prior off helps: {said}"
    if found.reason == "it does harm":
        return f"Taking the language prior off does harm: {said}"
    return f"Taking the language prior off changes little: {said}"


def _two_digits(value: float) -> str:
    return f"{0.0 if abs(value) < 0.005 else value:.2f}".replace("-", "\N{MINUS SIGN}")


def _say_explains(found: Finding) -> str:
    about = found.about
    if found.value != found.value:
        return f"{about['circuit']} has no faithfulness: {found.reason}."
    said = f"{about['circuit']} ({about['edges']}) keeps {found.amount} of the answer by itself ({found.sure}; {about['ablation']})"
    others = f" It keeps {about['others']}." if about["others"] else ""
    if found.holds:
        return f"{said}, what is left out {about['left']}, and none of {about['draws']} random circuits does as well.{others}"
    return f"{said}: {found.reason}.{others}"


def _say_comes_near(found: Finding) -> str:
    if found.value != found.value:
        return f"The curve has no faithfulness: {found.reason}."
    said = f"CMD {found.amount} ({found.sure})"
    if found.holds:
        count = found.about["edges"]
        first = (
            f"the first {count} edges come within 10% of the model"
            if count
            else "chosen edges come nearer to the model"
        )
        return f"{_capital(first)}: {said}, random circuits {found.number(found.chance or 0.0)} at best."
    return f"{said}: {found.reason}."


def _say_needs(found: Finding) -> str:
    about = found.about
    if found.holds is None:
        return f"Which edges are needed cannot be said: {found.reason}."
    if found.holds:
        return f"Each of the {about['edges']} edges is needed: without it faithfulness changes by more than {about['eps']}."
    said = f"{about['spare']} of {about['edges']} edges can be removed, one alone, within {about['eps']} of the faithfulness"
    return f"{said}, such as {about['first']}."


def _say_margin(found: Finding) -> str:
    return found.amount


def _capital(text: str) -> str:
    """A sentence that begins with a word in capitals; names of components stay as they are spelled."""
    return text if is_component(" ".join(text.split(" ", 2)[:2])) else text[:1].upper() + text[1:]


def _say_few_edges(found: Finding) -> str:
    edges, total = (f"{int(found.about[name]):,}" for name in ("edges", "of"))
    if found.value != found.value:
        return "This graph has no scored edge" if total == "0" else f"All scores of the {total} edges are 0"
    if found.holds:
        verb = "carries" if edges == "1" else "carry"
        return f"{edges} of {total} edges {verb} {percent(found.value)} of all |score|"
    if found.holds is None:
        return (
            f"All {total} edges that have a score are drawn" if total != "1" else "The graph has a single scored edge"
        )
    return f"No few edges carry the score: the largest {edges} of {total} hold {percent(found.value)}, of noise {percent(found.chance or 0.0)}"


def _say_strongest_path(found: Finding) -> str:
    if "path" not in found.about:
        return "No path of scores above 0 leads from an input to the answer"
    path = found.about["path"]
    if found.holds is False:
        return f"Strongest path: {path}, of which one edge is not apart from 0 ({found.amount}, {found.sure})"
    return f"Strongest path: {path} (weakest edge {found.amount}, {found.sure})"


SENTENCES = {
    "few edges": _say_few_edges,
    "strongest path": _say_strongest_path,
    "answers": _say_answers,
    "swing": _say_swing,
    "head": _say_share,
    "heads": _say_share,
    "largest effect": _say_largest_effect,
    "back up": _say_back_up,
    "at answer": _say_at_answer,
    "patches": _say_patches,
    "past heads": _say_past,
    "carries": _say_carries,
    "attends": _say_attends,
    "attends too": _say_attends_too,
    "rolls out": _say_rolls_out,
    "differs": _say_differs,
    "looks near": _say_looks_near,
    "adds": _say_adds,
    "strongest at": _say_strongest_at,
    "narrow": _say_narrow,
    "peaks inside": _say_peaks,
    "explained": _say_explained,
    "promotes": _say_promotes,
    "among": _say_among,
    "stands out": _say_stands_out,
    "on object": _say_on_object,
    "ranks first": _say_ranks_first,
    "ranks at": _say_ranks_at,
    "points at classes": _say_points,
    "composes": _say_composes,
    "agrees": _say_agrees,
    "leads": _say_margin,
    "readable": _say_margin,
    "beats random": _say_margin,
    "steers": _say_steers,
    "injects": _say_injects,
    "separates": _say_separates,
    "listens": _say_listens,
    "succeeds": _say_succeeds,
    "interact": _say_interact,
    "repairs": _say_repairs,
    "modulates": _say_modulates,
    "reads background": _say_reads_background,
    "raises worst": _say_raises_worst,
    "interchanges": _say_interchanges,
    "understands": _say_understands,
    "calibrates": _say_calibrates,
    "explains": _say_explains,
    "comes near": _say_comes_near,
    "needs": _say_needs,
}
