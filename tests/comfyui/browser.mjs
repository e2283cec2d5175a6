// An example in ComfyUI's page: whether it is whole, what a node says while it runs, and whether its video plays. For
// visitor.mjs.
//
// PLAN: vue (Nodes 2.0 or the canvas renderer), workflow (UI format), name (of it, for the pictures), values ({node id:
// {widget: value}} to set before the run), enable (ids of bypassed nodes to switch on before it), screenshots (folder;
// null: none), drag (display name of a node to drag from the library), draw ({name: workflow} to load one after another in
// both renderers), run (whether to queue the workflow), players (how many will show videos then), watch (id of the node
// whose text and picture are noted during the run), panel (whether the panel of the groups is open then, and its button
// used afterwards), subgraph (whether that node is moved into a subgraph, which is open during the run), offer (whether
// the page may ask about files that are missing).
import { load, set, shoot, until } from './page.mjs';

const FRONTEND_ONLY = ['Note', 'MarkdownNote', 'Reroute', 'PrimitiveNode'];
const DIALOGS = '.p-dialog:visible, .comfy-modal:visible';

export async function visit(page, plan) {
  const picture = (name, workflow = plan.name, vue = plan.vue) =>
    shoot(page, plan.screenshots, `${workflow}_${name}_${vue ? 'nodes2' : 'canvas'}`);
  if (plan.offer) await set(page, 'Comfy.Workflow.ShowMissingModelsWarning', true);
  const result = await show(page, plan.workflow, plan.vue);
  if (plan.offer) await page.locator('.p-dialog:visible').first().waitFor({ timeout: 15000 });
  result.dialogs = await page.locator(DIALOGS).allInnerTexts();
  await picture('loaded');
  if (plan.offer) {
    await page.keyboard.press('Escape');
    await page.locator('.p-dialog:visible').first().waitFor({ state: 'hidden', timeout: 15000 });
    await set(page, 'Comfy.Workflow.ShowMissingModelsWarning', false);
  }
  if (plan.drag) result.dragged = await drag(page, plan.drag);
  if (plan.draw) result.drawn = await draw(page, plan.draw, picture);
  if (plan.run) Object.assign(result, await run(page, plan, picture));
  return result;
}

async function show(page, workflow, vue) {
  await load(page, workflow, vue);
  return page.evaluate(loaded, [workflow, FRONTEND_ONLY]);
}

// Runs in the page.
async function loaded([workflow, frontendOnly]) {
  const info = await (await fetch('/object_info')).json();
  const nodes = window.app.graph._nodes;
  // What the node would save: a picture that it shows is a widget as well.
  const widgets = node => node.serialize().widgets_values?.length ?? 0;
  const saved = node => workflow.nodes.find(other => other.id === node.id)?.widgets_values?.length;
  return {
    missing: nodes.filter(node => !(node.type in info) && !frontendOnly.includes(node.type)).map(node => node.type),
    red: nodes.filter(node => node.has_errors).map(node => node.type),
    shifted: nodes.filter(node => saved(node) !== undefined && saved(node) !== widgets(node)).map(node => node.type),
    links: [...window.app.graph.links.values()].length,
    api: (await window.app.graphToPrompt()).output,
  };
}

async function drag(page, name) {
  await page.evaluate(() => window.app.extensionManager.command.execute('Workspace.ToggleSidebarTab.node-library'));
  await page.locator('input[placeholder*="Search Nodes"]').fill(name);
  const before = await page.evaluate(() => window.app.graph._nodes.length);
  const leaf = page.locator('.p-tree-node-leaf').filter({ hasText: name }).first();
  await leaf.waitFor({ timeout: 15000 });
  await leaf.dragTo(page.locator('#graph-canvas'), { targetPosition: { x: 1300, y: 850 } });
  await until(page, count => window.app.graph._nodes.length > count, 15000, before);
  const type = await page.evaluate(() => window.app.graph._nodes.at(-1).type);
  await page.evaluate(() => {
    window.app.graph.remove(window.app.graph._nodes.at(-1));
    window.app.extensionManager.command.execute('Workspace.ToggleSidebarTab.node-library');
  });
  return type;
}

async function draw(page, workflows, picture) {
  const drawn = [];
  for (const vue of [false, true])
    for (const [name, workflow] of Object.entries(workflows)) {
      const shown = await show(page, workflow, vue);
      const dialogs = await page.locator(DIALOGS).allInnerTexts();
      drawn.push({ name, vue, dialogs, ...shown, ...await page.evaluate(look, vue) });
      await picture('drawn', name, vue);
    }
  return drawn;
}

// Runs in the page: the titles of nodes that lie on each other, and of notes that do not show all of their text.
function look(vue) {
  const nodes = window.app.graph._nodes, overlaps = [];
  const box = node => {
    if (vue) return document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect();
    const [left, top, width, height] = node.boundingRect;
    return { left, top, right: left + width, bottom: top + height };
  };
  nodes.forEach((node, index) => {
    const one = box(node);
    for (const other of nodes.slice(index + 1)) {
      const two = box(other);
      if (one.left < two.right && two.left < one.right && one.top < two.bottom && two.top < one.bottom)
        overlaps.push([node.title, other.title]);
    }
  });
  const cut = [...document.querySelectorAll('.comfy-markdown .tiptap')]
    .filter(note => note.scrollHeight > note.clientHeight + 1).map(note => note.innerText.slice(0, 40));
  return { overlaps, cut };
}

async function run(page, plan, picture) {
  const result = {};
  await page.evaluate(([values, enable]) => {
    for (const node of window.app.graph._nodes) {
      for (const [name, value] of Object.entries(values[node.id] ?? {})) {
        const widget = node.widgets.find(widget => widget.name === name);
        widget.value = value;
        // By it Nodes 2.0 learns of the value.
        widget.callback?.(value);
      }
      if (enable.includes(node.id)) node.mode = 0;
    }
    window.__ending = null;
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
      window.app.api.addEventListener(kind, event => { window.__ending = [kind, event.detail]; });
  }, [plan.values, plan.enable ?? []]);
  const watched = plan.subgraph ? await page.evaluate(enclose, Number(plan.watch)) : Number(plan.watch);
  await page.evaluate(watch, watched);
  await page.evaluate(() => { window.app.queuePrompt(0, 1); });
  if (plan.panel) await openPanel(page, picture);
  await until(page, () => window.__ending, 180000);
  result.ending = await page.evaluate(() => window.__ending);
  await until(
    page, count => [...document.querySelectorAll('video')].filter(video => video.readyState === 4).length >= count,
    60000, plan.players,
  ).catch(() => {});
  result.players = await page.evaluate(async () => {
    const players = [...document.querySelectorAll('video')];
    return Promise.all(players.map(async video => {
      video.muted = true;
      await video.play().catch(() => {});
      // The clips are shorter than a second, and start again at their end.
      for (let i = 0; i < 100 && video.currentTime <= 0.1; i++) await new Promise(resolve => setTimeout(resolve, 50));
      return {
        src: video.src || video.querySelector('source')?.src, ready: video.readyState, width: video.videoWidth,
        height: video.videoHeight, time: video.currentTime, duration: video.duration, error: video.error?.message ?? null,
      };
    }));
  });
  await picture('done');
  result.live = await page.evaluate(() => window.__seen);
  if (plan.panel) result.panel = await panel(page, picture);
  return result;
}

// Runs in the page: the id that the node has inside.
function enclose(id) {
  const { graph, canvas } = window.app;
  const { node, subgraph } = graph.convertToSubgraph(new Set([graph.getNodeById(id)]));
  canvas.openSubgraph(subgraph, node);
  return subgraph.nodes[0].id;
}

// Runs in the page: notes what the node, in the graph that is open, shows of the video before there is one, and the
// panel beside it. One after another: a small video is done in seconds.
function watch(id) {
  const seen = window.__seen = {};
  const timer = setInterval(() => {
    const node = window.app.canvas.graph.getNodeById(id);
    const screen = node.widgets.find(widget => widget.name === 'wan_video').element, image = screen.querySelector('img');
    if (image.naturalWidth && image.checkVisibility()) seen.image ??= [image.naturalWidth, image.naturalHeight];
    const texts = screen.checkVisibility() ? screen.innerText : '';
    seen.line ??= /sampling [1-9].*/.exec(texts)?.[0];
    seen.usage ??= /.*GiB.*/.exec(texts)?.[0];
    const group = document.querySelector('.wan-groups li')?.innerText;
    if (group?.includes('Running')) seen.group = group;
    if (window.__ending) clearInterval(timer);
  }, 50);
}

async function openPanel(page, picture) {
  await page.evaluate(() => window.app.extensionManager.command.execute('Workspace.ToggleSidebarTab.wan.distributed.groups'));
  await until(page, () => window.__ending || (window.__seen.image && window.__seen.usage), 180000);
  await picture('live');
}

// The group that waits now, and that its button lets it go.
async function panel(page, picture) {
  const group = page.locator('.wan-groups li').filter({ hasText: 'Warm' });
  await group.waitFor({ timeout: 15000 });
  await picture('warm');
  const shown = await group.innerText();
  const button = group.getByRole('button');
  await button.focus();
  await page.keyboard.press('Enter');
  await group.waitFor({ state: 'detached', timeout: 15000 });
  const left = await page.locator('.wan-groups').innerText();
  await page.evaluate(() => window.app.extensionManager.command.execute('Workspace.ToggleSidebarTab.wan.distributed.groups'));
  return { shown, left };
}
