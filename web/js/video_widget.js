import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { Screen } from "./screen.js";

const NODES = ["WanVideoDistributedInference", "WanVideoDistributedBatch", "WanVideoDistributedDoctor"];
const WIDGET = "wan_video";

// What was said last of the nodes of all open workflows: the page makes a workflow's nodes anew whenever its tab is
// opened. By the workflow's id and the way to the node.
const said = new Map();

function rootGraph() {
  return app.rootGraph ?? app.graph;
}

// What runs has the id of its node or, inside a subgraph, the way to it: "12:3" is node 3 of the subgraph of node 12.
function nodeAt(executionId) {
  const way = String(executionId).split(":"), id = way.pop();
  let graph = rootGraph();
  for (const outer of way) graph = graph?.getNodeById(outer)?.subgraph;
  return graph?.getNodeById(id) ?? null;
}

function screenOf(node) {
  return node?.widgets?.find((widget) => widget.name === WIDGET)?.screen;
}

function addScreen(node) {
  const screen = new Screen(() => resize(node));
  const widget = node.addDOMWidget(WIDGET, WIDGET, screen.element, {
    // It is no value of a job that is queued; nor, by the second one, of a saved workflow.
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => screen.minHeight,
    getMaxHeight: () => (screen.minHeight ? undefined : 0),
  });
  widget.serialize = false;
  widget.screen = screen;
  const serialize = node.onSerialize;
  node.onSerialize = function (saved) {
    serialize?.call(this, saved);
    // Some pages leave a null in its place, which an input that is added later would be given.
    const place = this.widgets.indexOf(widget), values = saved.widgets_values;
    if (Array.isArray(values) && place >= 0 && place < values.length && values[place] == null) values.splice(place, 1);
  };
  const executed = node.onExecuted;
  node.onExecuted = function (output) {
    executed?.call(this, output);
    // Also of a run that ComfyUI had in its cache, of which nothing else is heard.
    if (output?.video) screen.show({ videos: output.video });
  };
}

// On the canvas a node does not grow with its widgets.
function resize(node) {
  const [width, height] = node.size, least = node.computeSize()[1];
  if (height < least) node.setSize([width, least]);
  node.setDirtyCanvas?.(true, true);
}

// One widget for what a node says, for the picture of what it makes and for the videos that it made. The page's own
// previews differ from renderer to renderer and from version to version.
app.registerExtension({
  name: "wan.distributed.video",
  // Now, not with the first text: Nodes 2.0 does not see widgets that come later.
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) addScreen(node);
  },
  afterConfigureGraph() {
    const id = rootGraph()?.id;
    for (const { workflow, node, ...told } of said.values()) if (workflow === id) screenOf(nodeAt(node))?.show(told);
  },
  setup() {
    api.addEventListener("wan_distributed.node", ({ detail }) => {
      const { workflow, node } = detail, key = `${workflow}/${node}`;
      const told = { ...said.get(key), ...detail };
      // The picture is what the video is going to be: it goes when there is one, or none.
      if (detail.ended) delete told.picture;
      said.set(key, told);
      // Another workflow's node may have the same number.
      if (workflow && workflow !== rootGraph()?.id) return;
      screenOf(nodeAt(node))?.show(detail);
    });
  },
});
