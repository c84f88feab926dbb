"""What the main job found, as values; the findings say which of it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from circuitvision import findings
from circuitvision.circuits import AblationCheck, HeadImportance, parse_id
from circuitvision.findings import Finding
from circuitvision.model.names import head_name
from circuitvision.plots.style import signed_percent
from circuitvision.quickstart import findings as of_case
from circuitvision.quickstart.cases import Case
from circuitvision.quickstart.circuit import EdgeCircuit
from circuitvision.readout.lens.result import LensResult

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class Reading:
    """What the model makes of one image: its answer, and how likely it finds that, the answer asked about and the foil.

    Of captions the probabilities are those of a choice between the two.
    """

    says: str
    probability: float
    answer: float
    foil: float
    chance: float = 0.0
    """The probability of each answer if all were alike."""
    verb: str = "says"

    def __str__(self) -> str:
        return f"the model {self.verb} {self.says} ({self.probability:.0%})"


@dataclass(frozen=True)
class Quickstart:
    """What the main job found, and the files it wrote.

    ``lenses`` holds per run the lens of every tower that the images reach and the answer's head can read, in the order in which the towers run;
    ``read_through`` says of each tower but the last what lies between it and that head. ``edges`` is the circuit of edges and its tests, if asked
    for.
    """

    case: Case
    importance: HeadImportance
    graph: nx.MultiDiGraph
    lenses: dict[str, list[LensResult]]
    check: AblationCheck | None
    readings: dict[str, Reading]
    read_through: Mapping[str, str] = field(default_factory=dict)
    edges: EdgeCircuit | None = None
    files: list[Path] = field(default_factory=list)
    seconds: float = 0.0

    def table(self, count: int = 8) -> list[tuple[str, str, str]]:
        """The strongest heads as (head, tower, share moved), strongest first; "–" where the swing is too small for shares."""
        rows, told = [], findings.has_shares(self.importance)
        for name, share, _ in self.importance.ranking()[:count]:
            node = parse_id(name)
            rows.append((head_name(node.layer, node.head), node.tower, signed_percent(share) if told else "–"))
        return rows

    def findings(self) -> dict[str, Finding]:
        """What was found, as values with their numbers: whether the model gives the answers asked about, how far the metric swings, what the best
        head and all selected heads move, where the answers are told apart, and whether ablating the heads costs the answer.
        """
        case, names = self.case, self.case.names
        asked = of_case.answers(self.readings["clean"], self.readings["corrupt"], case.answer, case.foil)
        clean, corrupt = self.lenses["clean"], self.lenses["corrupt"]
        head, heads = findings.best_head(self.importance, asked), findings.together(self.importance, asked)
        found = {
            "answers": asked,
            "swing": findings.swing(self.importance),
            "head": head,
            "heads": heads,
            "back up": of_case.back_each_other_up(head, heads),
            "past heads": of_case.past_heads(self.importance, asked),
            "at answer": of_case.read_at_answer(clean[-1], corrupt[-1], asked, names),
            "patches": of_case.read_at_patches(clean, corrupt, asked, names),
        }
        return found if self.check is None else {**found, "carries": findings.carries(self.check)}

    def finding(self, cautions: bool = True) -> str:
        """The result in a few sentences, what must be known first in front; without ``cautions`` where those already stand above."""
        found, said = self.findings(), ("answers", "swing", "head", "heads", "past heads")
        told = [] if cautions else self.cautions()
        return " ".join(text for text in (str(found[name]) for name in said) if text and text not in told)

    def head_finding(self) -> str:
        """What the best head moves alone, or that no head moves alone what several move together."""
        found = self.findings()
        return str(found["back up"] if found["back up"].holds else found["head"]).replace(
            " of that", " of the difference"
        )

    def lens_finding(self) -> str:
        """From which layer on answer and foil are told apart where the answer is read, and whether any patch does."""
        found = self.findings()
        return f"{found['at answer']}, {found['patches']}" if found["at answer"].holds else str(found["at answer"])

    def cautions(self) -> list[str]:
        """What a reader should know before believing the result; empty when all is as asked."""
        found = self.findings()
        said = [str(found[name]) for name in ("answers", "swing") if not found[name].holds]
        if found["swing"].value < 0:
            said.append(
                f"The model leans more to {self.case.answer!r} on the corrupt image than on the clean one, so what moves here is its "
                f"leaning to {self.case.foil!r}; swap the images or the {self.case.kind.plural}."
            )
        said += [str(found[name]) for name in ("head", "heads") if "overshoots" in found[name].reason]
        return said


def lens_finding(found: Quickstart) -> str:
    """See :meth:`Quickstart.lens_finding`."""
    return found.lens_finding()
