// Opens an exported graph (.graphml or .gexf) in graphology and prints what it holds as JSON.
import {readFileSync} from 'node:fs';
import {createRequire} from 'node:module';

const require = createRequire(import.meta.url);
const {MultiDirectedGraph} = require('graphology');
const path = process.argv[2];
const parse = path.endsWith('.gexf') ? require('graphology-gexf').parse : require('graphology-graphml').parse;
const graph = parse(MultiDirectedGraph, readFileSync(path, 'utf-8'));
const nodes = graph.mapNodes((node, attributes) => ({node, attributes}));
const edges = graph.mapEdges((key, attributes, source, target) => ({key, source, target, attributes}));
console.log(JSON.stringify({type: graph.type, multi: graph.multi, nodes, edges}));
