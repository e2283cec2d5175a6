import { app } from "../../../scripts/app.js";

// Some frontends show the video of a node without a VIDEO input as a broken image; this names the kind of media.
app.registerExtension({
  name: "wan.distributed.videoPreview",
  nodeCreated(node) {
    if (node.comfyClass === "WanVideoDistributedInference") node.previewMediaType = "video";
  },
});
