import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { release } from "./release.js";

const INTERVAL = 1500; // milliseconds between two looks
const GIB = 2 ** 30;
const NOTHING = "No GPU is held. A video's processes show up here while it is made, and afterwards for as long as "
  + "keep_warm_seconds of Wan Video Distributed Config says.";

const STYLE = `
  .wan-groups { padding: 0.75rem; color: var(--fg-color); font-size: 0.875rem; overflow-y: auto; height: 100%; box-sizing: border-box; }
  .wan-groups header { display: flex; align-items: center; justify-content: space-between; gap: 0.5rem; margin-bottom: 0.75rem; }
  .wan-groups h2 { font-size: 1rem; font-weight: 600; margin: 0; }
  .wan-groups ul { list-style: none; margin: 0; padding: 0; display: grid; gap: 0.75rem; }
  .wan-groups li { border: 1px solid var(--border-color); border-radius: 6px; padding: 0.75rem; background: var(--comfy-input-bg); display: grid; gap: 0.4rem; }
  .wan-groups .name { font-weight: 600; overflow-wrap: anywhere; }
  .wan-groups .quiet { color: var(--descrip-text); margin: 0; }
  .wan-groups .top { display: flex; justify-content: space-between; gap: 0.5rem; align-items: start; }
  .wan-groups .state { border: 1px solid currentColor; border-radius: 999px; padding: 0 0.5rem; font-size: 0.75rem; white-space: nowrap; }
  .wan-groups progress, .wan-groups meter { width: 100%; height: 0.5rem; accent-color: var(--p-primary-color, #3b82f6); }
  .wan-groups table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
  .wan-groups td { padding: 0.1rem 0 0.1rem 0.5rem; white-space: nowrap; }
  .wan-groups td:first-child { padding-left: 0; }
  .wan-groups td.bar { width: 100%; }
  .wan-groups td.amount { text-align: right; }
  .wan-groups button { font: inherit; color: inherit; background: var(--comfy-menu-bg); border: 1px solid var(--border-color); border-radius: 4px; padding: 0.25rem 0.75rem; cursor: pointer; }
  .wan-groups button:disabled { opacity: 0.5; cursor: default; }
  .wan-groups button:focus-visible { outline: 2px solid var(--p-primary-color, #3b82f6); outline-offset: 1px; }
  .wan-groups [hidden] { display: none; }`;

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}

// Changed in place, not made anew: the button that has the keyboard's focus must stay.
class Card {
  constructor(id, onRelease) {
    this.root = element("li");
    this.root.dataset.group = id;
    const top = element("div", "top");
    this.name = element("span", "name");
    this.state = element("span", "state");
    top.append(this.name, this.state);
    this.place = element("p", "quiet");
    this.progress = element("progress");
    this.progress.setAttribute("aria-label", "Progress of the video");
    this.text = element("p", "quiet");
    this.usage = element("table");
    this.usage.setAttribute("aria-label", "Memory in use");
    this.button = element("button");
    this.button.type = "button";
    this.button.addEventListener("click", () => onRelease(id));
    this.root.append(top, this.place, this.progress, this.text, this.usage, this.button);
  }

  show(group) {
    const running = group.state === "running";
    this.name.textContent = group.model;
    this.state.textContent = running ? "Running" : "Warm";
    this.place.textContent = group.place;
    this.progress.hidden = group.fraction === null;
    this.progress.value = group.fraction ?? 0;
    this.text.textContent = running ? group.text : `${group.text}, ${clock(group.seconds_left)} left`;
    this.usage.replaceChildren(...group.usage.map(usageRow));
    this.button.textContent = running ? "Release when done" : "Release";
    if (group.ends_with_job) this.button.textContent = "Ends when done";
    this.button.disabled = group.ends_with_job;
    this.button.setAttribute("aria-label", `${this.button.textContent}: ${group.model}, ${group.place}`);
  }
}

function usageRow({ name, used, total, percent }) {
  const row = element("tr"), bar = element("td", "bar");
  if (total !== null) {
    const meter = element("meter");
    meter.max = total;
    meter.value = used;
    meter.setAttribute("aria-label", `Memory of ${name}`);
    bar.append(meter);
  }
  const amount = (used / GIB).toFixed(1) + (total === null ? "" : ` / ${Math.round(total / GIB)}`) + " GiB";
  row.append(element("td", "", name), bar, element("td", "amount", amount));
  if (percent !== null) row.append(element("td", "amount", `${percent} %`));
  return row;
}

class Panel {
  constructor(container) {
    this.cards = new Map();
    this.root = element("section", "wan-groups");
    this.root.setAttribute("aria-label", "Wan GPUs");
    const header = element("header");
    this.all = element("button", "", "Release all");
    this.all.type = "button";
    this.all.addEventListener("click", () => this.release());
    header.append(element("h2", "", "Wan GPUs"), this.all);
    this.message = element("p", "quiet");
    this.message.setAttribute("role", "status");
    this.list = element("ul");
    this.root.append(element("style", "", STYLE), header, this.message, this.list);
    container.replaceChildren(this.root);
    this.look();
  }

  // The page puts the panel into the document some time after it was made, takes it out when another tab is opened, and
  // makes a new one later.
  async look() {
    if (this.root.isConnected) this.wasShown = true;
    else if (this.wasShown) return;
    if (this.wasShown && !document.hidden && this.root.offsetParent !== null) await this.refresh();
    setTimeout(() => this.look(), this.wasShown ? INTERVAL : 50);
  }

  async refresh() {
    try {
      const answer = await api.fetchApi("/wan_distributed/groups");
      if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
      this.show((await answer.json()).groups);
    } catch (error) {
      this.message.hidden = false;
      this.message.textContent = `The list cannot be read: ${error.message}`;
    }
  }

  show(groups) {
    for (const [id, card] of this.cards)
      if (!groups.some(group => group.id === id)) {
        card.root.remove();
        this.cards.delete(id);
      }
    for (const group of groups) {
      if (!this.cards.has(group.id)) {
        this.cards.set(group.id, new Card(group.id, id => this.release(id)));
        this.list.append(this.cards.get(group.id).root);
      }
      this.cards.get(group.id).show(group);
    }
    this.all.disabled = groups.every(group => group.ends_with_job);
    this.message.hidden = groups.length > 0;
    if (this.message.textContent !== NOTHING) this.message.textContent = NOTHING;
  }

  async release(id) {
    await release(id);
    await this.refresh();
  }
}

app.registerExtension({
  name: "wan.distributed.groups",
  setup() {
    app.extensionManager?.registerSidebarTab?.({
      id: "wan.distributed.groups",
      icon: "pi pi-server",
      title: "Wan GPUs",
      tooltip: "Wan GPUs: processes that make videos or wait for the next one",
      type: "custom",
      render: container => { new Panel(container); },
    });
  },
});
