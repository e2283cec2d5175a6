import { app } from "../../../scripts/app.js";

// What runs has the id of its node or, inside a subgraph, the way to it: "12:3" is node 3 of the subgraph of node 12.
export function nodeAt(executionId) {
  const way = String(executionId).split(":"), id = way.pop();
  let graph = app.graph;
  for (const outer of way) graph = graph?.getNodeById(outer)?.subgraph;
  return graph?.getNodeById(id) ?? null;
}

// The key under which the page keeps a node's pictures and outputs.
export function locator(node) {
  return !node.graph || node.graph.isRootGraph ? String(node.id) : `${node.graph.id}:${node.id}`;
}
