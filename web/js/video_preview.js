import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { locator, nodeAt } from "./execution_id.js";

const NODES = ["WanVideoDistributedInference", "WanVideoDistributedBatch"];

function ours(executionId) {
  const node = nodeAt(executionId);
  return NODES.includes(node?.comfyClass) ? node : null;
}

// A node shows its pictures before its outputs, and the canvas would go on drawing them.
function showVideo(executionId) {
  const node = ours(executionId);
  if (!node) return;
  delete app.nodePreviewImages[locator(node)];
  const picture = node.widgets?.find((widget) => widget.name === "$$canvas-image-preview");
  if (picture) node.removeWidget(picture);
  node.imgs = undefined;
  node.imageIndex = null;
  node.images = undefined;
  node.previewMediaType = "video";
  node.setDirtyCanvas?.(true, true);
}

// Some frontends show the video of a node without a VIDEO input as a broken image; this names the kind of media.
app.registerExtension({
  name: "wan.distributed.videoPreview",
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) node.previewMediaType = "video";
  },
  // While it samples the node shows pictures, and the canvas takes whatever a node shows for the kind that it is told.
  setup() {
    api.addEventListener("b_preview_with_metadata", ({ detail }) => {
      const node = ours(detail.displayNodeId);
      if (!node || node.previewMediaType === "image") return;
      // The player of the run before, which would be given the picture to play.
      const player = node.widgets?.find((widget) => widget.name === "video-preview");
      if (player) node.removeWidget(player);
      node.videoContainer = undefined;
      node.previewMediaType = "image";
    });
    api.addEventListener("executed", ({ detail }) => showVideo(detail.display_node ?? detail.node));
    // The video of the run before, if there was one.
    for (const ending of ["execution_interrupted", "execution_error"])
      api.addEventListener(ending, ({ detail }) => showVideo(detail.node_id));
  },
});
