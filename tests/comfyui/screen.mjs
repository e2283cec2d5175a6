// What a node shows before, while and after its runs, in both renderers. For visitor.mjs.
//
// PLAN: vue (the renderer that is first), workflow (UI format), node (id of the one that is looked at), values ({node id:
// {widget: value}}), seed (of the first run, each later one has the next), videos (how many a run makes), runs (how many),
// title (for the pictures), screenshots (folder; null: none).
import { load, settled, shoot, until } from './page.mjs';

export async function visit(page, plan) {
  const result = {};
  let seed = plan.seed;
  for (const vue of [plan.vue, !plan.vue]) {
    result[vue ? 'nodes2' : 'canvas'] = await seenIn(page, plan, vue, seed);
    seed += plan.runs + 1;
  }
  return result;
}

async function seenIn(page, plan, vue, seed) {
  await load(page, plan.workflow, vue);
  await page.evaluate(prepare, [plan.values, Number(plan.node)]);
  const picture = name => shoot(page, plan.screenshots, `${plan.title}_${vue ? 'nodes2' : 'canvas'}_${name}`);
  const seen = { before: await page.evaluate(look), runs: [] };
  await picture('before');
  for (let run = 1; run <= plan.runs; run++) {
    await page.evaluate(queue, seed++);
    await until(page, () => window.__ending || window.__drawn(), 120000);
    await picture(`while_${run}`);
    await until(page, () => window.__ending, 120000);
    await until(
      page, count => window.__look().players.filter(player => player.ready === 4).length === count, 60000, plan.videos,
    ).catch(() => {});
    const [live, after, ending] = await page.evaluate(() => [window.__live, window.__look(), window.__ending]);
    await picture(`after_${run}`);
    seen.runs.push({ live, after, ending });
  }
  // Cancelled at its first picture: the videos of the run before are there again.
  await page.evaluate(queue, seed++);
  await until(page, () => window.__ending || window.__drawn(), 120000);
  await page.evaluate(() => window.app.api.interrupt(null));
  await until(page, () => window.__ending, 120000);
  // Of the pack and of ComfyUI come two messages.
  await until(page, () => window.__look().text === 'cancelled', 60000).catch(() => {});
  seen.cancelled = await page.evaluate(look);
  // As when another tab is opened and this one again: the page makes the nodes anew.
  await page.evaluate(() => window.app.loadGraphData(window.app.graph.serialize()));
  await settled(page);
  seen.reopened = await page.evaluate(look);
  seen.saved = await page.evaluate(() => window.app.graph.serialize().nodes.map(node => ({
    type: node.type, values: node.widgets_values ?? [] })));
  seen.sent = await page.evaluate(async id => Object.keys((await window.app.graphToPrompt()).output[id].inputs), plan.node);
  seen.unplayable = await page.evaluate(unplayable, Number(plan.node));
  seen.overruled = await page.evaluate(overruled, Number(plan.node));
  await picture('overruled');
  return seen;
}

// Runs in the page: what the node says of a file that no browser plays, and that the next one plays.
async function unplayable(id) {
  const node = window.app.graph.getNodeById(id), screen = node.widgets.find(widget => widget.name === 'wan_video').element;
  const [{ src }] = screen.querySelectorAll('video'), name = new URL(src).searchParams;
  const output = Object.fromEntries(['filename', 'subfolder', 'type'].map(key => [key, name.get(key)]));
  const played = async video => {
    node.onExecuted({ video: [video] });
    for (let tries = 0; tries < 100; tries++) {
      const found = screen.querySelector('video');
      if (!found || found.readyState === 4) return found ? 'plays' : screen.innerText;
      await new Promise(resolve => setTimeout(resolve, 100));
    }
    return null;
  };
  return { other: await played({ ...output, filename: 'no.mkv' }), again: await played(output) };
}

// Runs in the page: the widgets that the node does not show, with its links and the preset 'custom', with another preset,
// and with neither a config nor embeddings.
async function overruled(id) {
  const node = window.app.graph.getNodeById(id), card = () => document.querySelector(`[data-node-id="${id}"]`);
  const preset = node.widgets.find(widget => widget.name === 'preset');
  const look = async () => {
    await new Promise(resolve => setTimeout(resolve, 300));
    const names = how => node.widgets.filter(how).map(widget => widget.name);
    return { hidden: names(widget => widget.hidden), grey: names(widget => widget.disabled), height: node.size[1],
      text: card()?.innerText ?? '' };
  };
  const choose = value => { preset.value = value; preset.callback?.(value); };
  choose('custom');
  const linked = await look();
  choose('Lightning 4 steps');
  const chosen = await look();
  choose('custom');
  for (const name of ['config', 'text_embeds']) node.disconnectInput(node.inputs.findIndex(input => input.name === name));
  return { linked, chosen, unlinked: await look(), sent: Object.keys((await window.app.graphToPrompt()).output[id].inputs) };
}

// Runs in the page.
function prepare([values, id]) {
  for (const node of window.app.graph._nodes)
    for (const [name, value] of Object.entries(values[node.id] ?? {})) {
      const widget = node.widgets.find(widget => widget.name === name);
      widget.value = value;
      widget.callback?.(value);
    }
  const node = () => window.app.graph.getNodeById(id);
  // The node as the pages show it: the widget's own element, and whatever the page itself adds.
  window.__look = () => {
    const widget = node().widgets.find(widget => widget.name === 'wan_video');
    const own = widget?.element, card = document.querySelector(`[data-node-id="${id}"]`);
    const visible = element => element.checkVisibility() && element.getBoundingClientRect().height > 20;
    const box = own?.getBoundingClientRect();
    const picture = own?.querySelector('img');
    return {
      text: own?.isConnected && own.checkVisibility() ? own.innerText : null,
      picture: picture?.isConnected && visible(picture) && picture.naturalWidth ? [picture.naturalWidth, picture.naturalHeight] : null,
      players: [...own?.querySelectorAll('video') ?? []].filter(visible).map(video => ({
        ready: video.readyState, width: video.videoWidth, height: video.videoHeight, error: video.error?.message ?? null,
        src: video.src, shown: [Math.round(video.getBoundingClientRect().width), Math.round(video.getBoundingClientRect().height)],
      })),
      box: box && [box.left, box.top, box.width, box.height].map(Math.round),
      // Of the page.
      others: [...new Set([...node().widgets.map(widget => widget.name).filter(name => /^\$\$|preview$/.test(name) && name !== 'preview'),
        ...[...card?.querySelectorAll('img, video') ?? []].filter(media => !own.contains(media)).map(media => media.outerHTML.slice(0, 200))])],
      images: node().imgs?.length ?? 0,
      failed: /failed to load/i.test(card?.innerText ?? ''),
    };
  };
  // Kept at once: the picture may be gone before anybody else looks.
  window.__drawn = () => {
    const seen = window.__look();
    if (seen.picture) window.__live ??= seen;
    return window.__live;
  };
  for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
    window.app.api.addEventListener(kind, event => { window.__ending = [kind, event.detail]; });
}

// Runs in the page.
function look() { return window.__look(); }

// Runs in the page.
function queue(seed) {
  for (const node of window.app.graph._nodes) {
    const widget = node.widgets?.find(widget => widget.name === 'seed');
    if (widget) { widget.value = seed; widget.callback?.(seed); }
  }
  window.__ending = window.__live = null;
  window.app.queuePrompt(0, 1);
}
