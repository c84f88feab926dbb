"""Plotly figures for every kind of result, and pages that need no network.

``plot(result)`` finds the figure by the result's class; ``result.plot()`` is the same. Nothing here computes a result.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitvision.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    import networkx as nx
    import plotly.graph_objects as go

    from circuitvision.circuits.node_attention import NodeAttention

_FIGURES = {
    "ClaimTests": ("claims", "claim"),
    "Attribution": ("attribution", "attribution"),
    "BilinearAttribution": ("attribution", "bilinear"),
    "Discovery": ("circuit_choice", "discovery"),
    "EdgeAttribution": ("circuits", "edges"),
    "QKAttribution": ("circuit_choice", "scores"),
    "DataReading": ("over_data", "reading"),
    "LensSummary": ("lens_summaries", "summary"),
    "LogProbIncrease": ("attribution", "increase"),
    "Ranking": ("attribution", "ranked"),
    "SourceAttribution": ("attribution", "sources"),
    "SourceIncrease": ("attribution", "sources"),
    "TunedLens": ("lens_summaries", "tuned"),
    "ClassValueAgreement": ("weights", "class_value_agreement"),
    "CompositionScores": ("weights", "composition"),
    "SingularVectors": ("weights", "singular_vectors"),
    "KeyValueAgreement": ("weights", "key_value_agreement"),
    "ValueVectors": ("weights", "value_vectors"),
    "AttentionContrast": ("attention", "contrast"),
    "AttentionMaps": ("attention", "overlay"),
    "AttentionRollout": ("attention", "rollout"),
    "AttentionSummary": ("attention", "summary"),
    "DistanceProfile": ("attention", "distance"),
    "PositionPattern": ("attention", "offsets"),
    "CKAResult": ("probes", "cka"),
    "DecisionLayers": ("probes", "decisions"),
    "MaxActivatingExamples": ("exemplars", "max_activating_examples"),
    "PCAResult": ("probes", "components"),
    "ProbeResult": ("probes", "probe"),
    "Curve": ("curves", "curve"),
    "PointingGame": ("curves", "pointing"),
    "Relevance": ("relevance", "relevance"),
    "HeadImportance": ("heads", "head_importance"),
    "PatchingResult": ("heads", "patching"),
    "PathPatching": ("paths", "paths"),
    "AblationCheck": ("heads", "ablation"),
    "LensResult": ("lens", "lens"),
    "Knockout": ("sweeps", "knockout"),
    "SweepResult": ("sweeps", "sweep"),
    "ClosedLoop": ("steering", "closed_loop"),
    "Direction": ("steering", "direction"),
    "InjectionResult": ("steering", "injection"),
    "PromptConditions": ("steering", "conditions"),
    "CircuitEvaluation": ("circuit_evaluation", "evaluation"),
    "FaithfulnessCurve": ("circuit_evaluation", "curve"),
    "LayerMatrix": ("circuit_evaluation", "layers"),
    "Minimality": ("circuit_evaluation", "minimality"),
    "DASResult": ("subspaces", "das"),
    "IllusionReport": ("subspaces", "illusion"),
    "SubspaceSweep": ("subspaces", "sweep"),
    "SteeringResponse": ("steering", "response"),
    "ValueVectorClusters": ("steering", "clusters"),
    "InteractionResult": ("interactions", "interactions"),
    "PairInteractions": ("interactions", "pairs"),
    "Dividends": ("interactions", "dividends"),
    "ShapleyValues": ("interactions", "shapley"),
    "ConditionalEffects": ("interactions", "conditional"),
    "ModulationResult": ("interactions", "modulation"),
    "EditOutcomes": ("answers", "outcomes"),
    "PriorCalibration": ("answers", "calibration"),
    "HeadRemoval": ("shortcuts", "removal"),
    "ShortcutHeads": ("shortcuts", "scores"),
}


def _check_keywords(figure: Any, name: str, keywords: dict[str, Any]) -> None:
    """Raises InputError that lists the keywords of a figure, if one is given that it does not take."""
    import inspect

    known = inspect.signature(figure).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    unknown = [word for word in keywords if word not in known]
    if unknown:
        raise InputError(
            f"The figure of {'an' if name[0] in 'AEIOU' else 'a'} {name} does not take {unknown[0]}=; it takes {', '.join(list(known)[1:])}. "
            f"help(cv.plots.{figure.__module__.rpartition('.')[2]}.{figure.__name__}) says what they are."
        )


def plot(result: Any, **keywords: Any) -> go.Figure:
    """The figure made for this kind of result, or its base class's; keywords go to the figure's function.

    Raises:
        InputError: nothing draws this kind of result.
    """
    import importlib

    for cls in type(result).__mro__:
        if cls.__name__ in _FIGURES:
            module, name = _FIGURES[cls.__name__]
            figure = getattr(importlib.import_module(f"circuitvision.plots.{module}"), name)
            _check_keywords(figure, type(result).__name__, keywords)
            return figure(result, **keywords)
    raise InputError(
        f"There is no figure for a {type(result).__name__}; known are {', '.join(_FIGURES)}. Use to_frame()."
    )


_PAGES = {"CircuitEvaluation": "circuit_evaluation", "ClaimTests": "claims", "IllusionReport": "subspaces"}


def write_page(result: Any, path: str | Path) -> Path:
    """Write the one page that says all of a report (an illusion report, the tests of a claim), without network, complete or not at all.

    Raises:
        InputError: there is no page for this kind of result.
    """
    import importlib

    for cls in type(result).__mro__:
        if cls.__name__ in _PAGES:
            module = importlib.import_module(f"circuitvision.plots.{_PAGES[cls.__name__]}")
            found: Path = module.write_page(result, path)
            return found
    raise InputError(
        f"There is no page for a {type(result).__name__}; known are {', '.join(_PAGES)}. A figure is result.plot().write_html(path)."
    )


def circuit(graph: nx.MultiDiGraph, *, n: int | None = None, share: float = 0.9, title: str | None = None) -> go.Figure:
    """The strongest edges of a circuit graph (schema ``circuitvision.graph/1``, any kind): towers side by side, layers from below.

    Args:
        graph: what ``to_networkx()`` of a result gives, or a loaded graph.
        n: how many edges, the largest first; None: the fewest that hold ``share`` of the sum of all ``|score|``, at most 60.
        share: see ``n``.
        title: in place of the finding; plain text.

    Raises:
        InputError: the graph breaks the schema, or ``n`` or ``share`` is none.
    """
    from circuitvision.plots import circuits

    return circuits.circuit(graph, n=n, share=share, title=title)


def write_circuit(
    graph: nx.MultiDiGraph,
    path: str | Path,
    *,
    n: int | None = None,
    share: float = 0.9,
    title: str | None = None,
    attention: NodeAttention | None = None,
    picture: Any = None,
    example: Any = None,
) -> Path:
    """Write a circuit graph as one interactive HTML file that needs no network, complete or not at all; returns the path.

    The page has a slider for the number of edges, shows ids, scores and the edges in and out of what is pointed at, and of a head that is clicked
    its edges and its attention over the image. ``page.html#theme=dark&n=200&node=v.a0.h1`` opens it so.

    Args:
        graph, n, share, title: as of :func:`circuit`; ``n`` and ``share`` say what is drawn at first.
        path: of the file.
        attention: :func:`circuitvision.circuits.attention_of` this graph.
        picture: what the model saw, ``[height width 3]`` of whole numbers 0 … 255 or a PIL image of any size; None: the maps alone.
        example: whose attention; None: the first.

    Raises:
        InputError: as :func:`circuit`; attention of another graph; a picture or example without attention.
    """
    from circuitvision.plots import circuit_page

    given: dict[str, Any] = {"attention": attention, "picture": picture, "example": example}
    return circuit_page.write(graph, path, n=n, share=share, title=title, **given)
