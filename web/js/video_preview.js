import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const NODES = ["WanVideoDistributedInference", "WanVideoDistributedBatch"];

function ours(id) {
  const node = app.graph.getNodeById(id);
  return NODES.includes(node?.comfyClass) ? node : null;
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
    api.addEventListener("executed", ({ detail }) => {
      const node = ours(detail.display_node ?? detail.node);
      if (!node) return;
      // A node shows its pictures before its outputs, and the canvas would go on drawing them.
      delete app.nodePreviewImages[node.id];
      const picture = node.widgets?.find((widget) => widget.name === "$$canvas-image-preview");
      if (picture) node.removeWidget(picture);
      node.imgs = undefined;
      node.imageIndex = null;
      node.previewMediaType = "video";
    });
  },
});
