import { app } from "../../../scripts/app.js";

// Nodes whose inputs say `overruled_by`: the name of another input that decides instead, a socket that is connected or a
// widget that is not at its default.
const rules = new Map();

function rulesOf({ required, optional }) {
  const inputs = Object.entries({ ...required, ...optional }), found = [];
  const defaults = Object.fromEntries(inputs.map(([name, [, options]]) => [name, options?.default]));
  for (const [name, [, options]] of inputs) {
    const by = options?.overruled_by;
    if (by) found.push({ name, by, off: defaults[by] });
  }
  return found;
}

function connected(node, name) {
  return node.inputs?.find((input) => input.name === name)?.link != null;
}

function decides(node, { by, off }) {
  const widget = node.widgets.find((one) => one.name === by);
  // What a link brings to a widget is not known here.
  return widget ? !connected(node, by) && widget.value !== off : connected(node, by);
}

// In newer pages a widget tells the page when it is hidden, by a property of its kind. Older ones leave a gap on the
// canvas, and Nodes 2.0 would not show it again: there it is grey.
function canHide(widget) {
  return "hidden" in Object.getPrototypeOf(widget);
}

// Hidden, not removed: their values stay in the workflow and are sent. One that is linked stays, or its link would end
// nowhere.
function update(node) {
  let changed = false;
  for (const rule of rules.get(node.comfyClass)) {
    const widget = node.widgets?.find((one) => one.name === rule.name);
    if (!widget) continue;
    const overruled = decides(node, rule) && !connected(node, rule.name);
    if (!canHide(widget)) {
      widget.disabled = overruled;
      continue;
    }
    changed ||= Boolean(widget.hidden) !== overruled;
    widget.hidden = overruled;
    // By this one Nodes 2.0 of some versions goes.
    widget.options.hidden = overruled;
  }
  return changed;
}

// The node gets smaller or larger by what it hides or shows. Not while a workflow is loaded: it was saved with its size.
function fit(node) {
  if (app.configuringGraph) return update(node);
  const before = node.computeSize()[1], extra = Math.max(node.size[1] - before, 0);
  if (!update(node)) return;
  node.setSize([node.size[0], node.computeSize()[1] + extra]);
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "wan.distributed.overruled",
  beforeRegisterNodeDef(type, { name, input }) {
    const found = rulesOf(input ?? {});
    if (found.length) rules.set(name, found);
  },
  nodeCreated(node) {
    const found = rules.get(node.comfyClass);
    if (!found) return;
    const connections = node.onConnectionsChange;
    node.onConnectionsChange = function (...news) {
      connections?.apply(this, news);
      fit(this);
    };
    for (const widget of node.widgets.filter((one) => found.some((rule) => rule.by === one.name))) {
      const told = widget.callback;
      widget.callback = function (...news) {
        told?.apply(this, news);
        fit(node);
      };
    }
    update(node);
  },
  loadedGraphNode(node) {
    if (rules.has(node.comfyClass)) update(node);
  },
});
