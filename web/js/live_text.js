import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { nodeAt } from "./execution_id.js";

const NODES = ["WanVideoDistributedInference", "WanVideoDistributedBatch"];
const WIDGET = "live_text";
const CANVAS_WIDGET = "$$node-text-preview";

// What a node says while it runs. The canvas renderer shows such text by itself, but not inside a subgraph; Nodes 2.0
// does not at all.
app.registerExtension({
  name: "wan.distributed.liveText",
  // Now, not with the first text: Nodes 2.0 does not see widgets that come later.
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    const element = document.createElement("div");
    element.style.cssText = "white-space: pre-line; font-size: 12px; line-height: 1.4; padding: 0 8px";
    const widget = node.addDOMWidget(WIDGET, WIDGET, element, { hideOnZoom: false, serialize: false });
    // It is no value: neither of a queued job, as said above, nor of a saved workflow.
    widget.serialize = false;
    // From the canvas; Nodes 2.0 goes by options.hidden.
    widget.hidden = true;
  },
  setup() {
    api.addEventListener("progress_text", ({ detail: { nodeId, text } }) => {
      const node = nodeAt(nodeId), widgets = node?.widgets ?? [];
      const widget = widgets.find((other) => other.name === WIDGET);
      if (!widget) return;
      widget.element.textContent = text;
      widget.hidden = node.graph.isRootGraph || widgets.some((other) => other.name === CANVAS_WIDGET);
    });
  },
});
