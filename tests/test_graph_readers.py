"""Exported graphs opened by other programs: NetworkX, igraph, graphology (in Node) and Cytoscape.js (in a headless browser)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from circuitvision.circuits.export import export
from tests.test_graph_files import two_towers

READERS = Path(__file__).parent / "graph_readers"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
Edges = dict[tuple[str, str, str], dict[str, Any]]


def expected_edges() -> Edges:
    return {(a, b, key): data for a, b, key, data in two_towers().edges(keys=True, data=True)}


def check(nodes: dict[str, dict[str, Any]], edges: Edges) -> None:
    """Every node and edge is there, parallel ones too, with all attributes; numbers of JavaScript know no difference of 0 and 0.0."""
    graph = two_towers()
    assert nodes.keys() == set(graph)
    for node, data in graph.nodes(data=True):
        assert {key: nodes[node].get(key) for key in data} == data, node
    assert edges.keys() == expected_edges().keys()
    for edge, data in expected_edges().items():
        assert {key: edges[edge].get(key) for key in data} == data, edge


# -- Python ------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".graphml", ".gexf", ".cyjs", ".json"])
def test_networkx(tmp_path, suffix):
    path = export(two_towers(), tmp_path / f"g{suffix}")
    if suffix == ".graphml":
        read = nx.read_graphml(path)
    elif suffix == ".gexf":
        read = nx.read_gexf(path)
    elif suffix == ".cyjs":
        read = nx.cytoscape_graph(json.loads(path.read_text()))
    else:
        read = nx.node_link_graph(json.loads(path.read_text()), edges="links")
    assert isinstance(read, nx.MultiDiGraph)
    check(dict(read.nodes(data=True)), {(a, b, data["slot"]): data for a, b, data in read.edges(data=True)})


def test_igraph_reads_graphml(tmp_path):
    igraph = pytest.importorskip("igraph")
    read = igraph.Graph.Read_GraphML(str(export(two_towers(), tmp_path / "g.graphml")))
    assert read.is_directed()
    assert read["metric"] == two_towers().graph["metric"]
    names = [vertex["id"] for vertex in read.vs]
    nodes = {vertex["id"]: vertex.attributes() for vertex in read.vs}
    edges = {(names[edge.source], names[edge.target], edge["slot"]): edge.attributes() for edge in read.es}
    check(nodes, edges)
    assert read.ecount() == two_towers().number_of_edges()


# -- JavaScript --------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packages(request) -> Path:
    """The readers' folder with their packages, fetched once and kept in pytest's cache."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs Node and npm")
    folder = Path(request.config.cache.mkdir("graph_readers"))
    wanted = (READERS / "package-lock.json").read_bytes()
    for file in READERS.iterdir():
        shutil.copy(file, folder / file.name)
    done = folder / "fetched"
    if not done.is_file() or done.read_bytes() != wanted:
        command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        fetched = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        if fetched.returncode and re.search(
            "ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT|ENETUNREACH|ENOTCACHED", fetched.stderr
        ):
            pytest.skip("npm reaches no registry")
        assert fetched.returncode == 0, fetched.stderr
        done.write_bytes(wanted)
    return folder


@pytest.mark.parametrize("suffix", [".graphml", ".gexf"])
def test_graphology(tmp_path, packages, suffix):
    path = export(two_towers(), tmp_path / f"g{suffix}")
    told = subprocess.run(["node", "read.mjs", str(path)], cwd=packages, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    read = json.loads(told.stdout)
    assert (read["type"], read["multi"]) == ("directed", True)
    nodes = {node["node"]: node["attributes"] for node in read["nodes"]}
    edges = {(edge["source"], edge["target"], edge["attributes"]["slot"]): edge["attributes"] for edge in read["edges"]}
    check(nodes, edges)
    assert {edge["key"] for edge in read["edges"]} == {data["uid"] for data in expected_edges().values()}
    if suffix == ".gexf":
        assert nodes["v.a0.h0"]["color"].startswith("rgba(0,114,178")
        assert len({(node["x"], node["y"]) for node in nodes.values()}) == len(nodes)


PAGE = """<!doctype html><meta charset="utf-8"><div id="graph" style="width:800px;height:600px"></div><pre id="told"></pre>
<script>{library}</script>
<script>
const file = {graph};
const cy = cytoscape({{container: document.getElementById('graph'), elements: file.elements, layout: {{name: 'preset'}}}});
const told = {{
  directed: file.directed,
  nodes: cy.nodes().map(node => ({{data: node.data(), at: node.position()}})),
  edges: cy.edges().map(edge => edge.data()),
}};
document.getElementById('told').textContent = btoa(unescape(encodeURIComponent(JSON.stringify(told))));
</script>"""


def test_cytoscape_in_a_browser(tmp_path, packages):
    import base64

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs Chromium")
    library = (packages / "node_modules/cytoscape/dist/cytoscape.min.js").read_text()
    text = export(two_towers(), tmp_path / "g.cyjs").read_text().replace("<", "\\u003c")
    page = tmp_path / "page.html"
    page.write_text(PAGE.format(library=library, graph=text), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    shown = subprocess.run([browser, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="told">([^<]+)</pre>', shown.stdout)
    assert found is not None, shown.stderr[-500:]
    told = json.loads(base64.b64decode(found[1]))
    nodes = {node["data"]["id"]: node["data"] for node in told["nodes"]}
    edges = {(edge["source"], edge["target"], edge["slot"]): edge for edge in told["edges"]}
    check(nodes, edges)
    heights = {node["data"]["id"]: node["at"]["y"] for node in told["nodes"]}
    assert heights["v.input"] > heights["v.a0.h0"] > heights["v.m1"]
