import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const NODES = ["WanVideoDistributedConfig", "WanVideoDistributedInference", "WanVideoDistributedBatch"];

// Of the group of this id, or of all of them. What is at work ends with its video or batch.
export async function release(group) {
  const body = JSON.stringify(group === undefined ? {} : { group });
  // The second one other pages cannot send, and the pack's routes want to see it.
  const headers = { "Content-Type": "application/json", "X-Wan-Distributed": "1" };
  let severity = "info", summary;
  try {
    const answer = await api.fetchApi("/wan_distributed/release", { method: "POST", headers, body });
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
    const { released } = await answer.json();
    summary = released ? "GPUs released" : "No idle GPUs; a running video or batch lets go of its own when it is done";
  } catch (error) {
    severity = "error";
    summary = `The GPUs were not released: ${error.message}`;
  }
  app.extensionManager?.toast?.add({ severity, summary, life: 3000 });
}

// In the nodes' context menu, not as a button on them: a widget would shift the values of saved workflows.
app.registerExtension({
  name: "wan.distributed.release",
  commands: [{ id: "wan.distributed.release", label: "Release GPUs", icon: "pi pi-power-off", function: () => release() }],
  menuCommands: [{ path: ["Extensions", "Wan Video Distributed"], commands: ["wan.distributed.release"] }],
  getNodeMenuItems(node) {
    return NODES.includes(node.comfyClass) ? [{ content: "Release GPUs", callback: () => release() }] : [];
  },
});
