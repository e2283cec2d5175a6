import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const NODES = ["WanVideoDistributedConfig", "WanVideoDistributedInference"];

async function release() {
  const answer = await api.fetchApi("/wan_distributed/release", { method: "POST" });
  const { released } = await answer.json();
  app.extensionManager?.toast?.add({
    severity: "info",
    summary: released ? "GPUs released" : "No GPU was held by an idle video process",
    life: 3000,
  });
}

// In the nodes' context menu, not as a button on them: a widget would shift the values of saved workflows.
app.registerExtension({
  name: "wan.distributed.release",
  commands: [{ id: "wan.distributed.release", label: "Release GPUs", icon: "pi pi-power-off", function: release }],
  menuCommands: [{ path: ["Extensions", "Wan Video Distributed"], commands: ["wan.distributed.release"] }],
  getNodeMenuItems(node) {
    return NODES.includes(node.comfyClass) ? [{ content: "Release GPUs", callback: release }] : [];
  },
});
