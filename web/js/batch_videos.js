import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { locator } from "./execution_id.js";

const WIDGET = "videos";

function player({ filename, subfolder, type }) {
  const video = document.createElement("video");
  Object.assign(video, { controls: true, loop: true, playsInline: true });
  video.style.width = "100%";
  video.src = api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
  return video;
}

function show(node, images) {
  let widget = node.widgets?.find((other) => other.name === WIDGET);
  if (!widget) {
    const grid = document.createElement("div");
    grid.style.cssText =
      "display: grid; gap: 4px; overflow: auto; align-content: start; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr))";
    // Nodes 2.0 has its own player, which leafs through the videos.
    widget = node.addDOMWidget(WIDGET, "video", grid, { canvasOnly: true, hideOnZoom: false });
    // Or it would be a value of saved workflows.
    widget.serialize = false;
    widget.computeLayoutSize = () => ({ minHeight: 220, minWidth: 220 });
  }
  widget.element.replaceChildren(...images.map(player));
}

function hide(node) {
  const widget = node.widgets?.find((other) => other.name === WIDGET);
  if (widget) node.removeWidget(widget);
}

// The canvas renderer's own preview of a node shows the first of its videos only.
app.registerExtension({
  name: "wan.distributed.batchVideos",
  nodeCreated(node) {
    if (node.comfyClass !== "WanVideoDistributedBatch") return;
    let shown;
    const refresh = (images) => {
      if (images === shown || !images?.length) return;
      shown = images;
      show(node, images);
    };
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.call(this, output);
      refresh(output.images);
    };
    // In the place of that preview, but for the pictures while it samples; after a change of tabs the videos of before
    // are found here.
    const draw = node.onDrawBackground;
    node.onDrawBackground = function (...drawing) {
      const key = locator(node);
      if (app.nodePreviewImages?.[key]) {
        hide(node);
        shown = undefined;
        draw?.apply(this, drawing);
      } else refresh(app.nodeOutputs?.[key]?.images);
    };
  },
});
