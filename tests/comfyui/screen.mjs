// What a node shows before, while and after its runs, in both renderers: node screen.mjs PLAN.json, JSON on stdout.
//
// PLAN: url, chromium (its path), playwright (folder of playwright-core), workflow (UI format), node (id of the one that
// is looked at), values ({node id: {widget: value}}), seed (of the first run, each later one has the next), videos (how
// many a run makes), runs (how many), title (for the pictures), screenshots (folder).
import fs from 'fs';
import path from 'path';
import { closeBanner, openPage, settled, startBrowser } from './page.mjs';

const plan = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const browser = await startBrowser(plan);
const result = { pageErrors: [] };
let seed = plan.seed;
try {
  for (const vue of [false, true]) result[vue ? 'nodes2' : 'canvas'] = await visit(vue);
} finally {
  await browser.close();
}
console.log(JSON.stringify(result));

async function visit(vue) {
  const page = await openPage(browser, plan.url, { vue, errors: result.pageErrors });
  await page.evaluate(workflow => window.app.loadGraphData(workflow, true, true, 'example'), plan.workflow);
  await settled(page);
  await page.evaluate(prepare, [plan.values, Number(plan.node)]);
  await closeBanner(page);
  const shoot = name => page.screenshot({ path: path.join(plan.screenshots, `${plan.title}_${vue ? 'nodes2' : 'canvas'}_${name}.png`) });
  const seen = { before: await page.evaluate(look), runs: [] };
  await shoot('before');
  for (let run = 1; run <= plan.runs; run++) {
    await page.evaluate(queue, seed++);
    await page.waitForFunction(() => window.__ending || window.__look().picture, null, { timeout: 120000 });
    const live = await page.evaluate(look);
    await shoot(`while_${run}`);
    await page.waitForFunction(() => window.__ending, null, { timeout: 120000 });
    await page.waitForFunction(
      count => window.__look().players.filter(player => player.ready === 4).length === count, plan.videos, { timeout: 10000 },
    ).catch(() => {});
    const after = await page.evaluate(look);
    await shoot(`after_${run}`);
    seen.runs.push({ live, after, ending: await page.evaluate(() => window.__ending), told: await page.evaluate(() => window.__told) });
  }
  // Cancelled at its first picture: the videos of the run before are there again.
  await page.evaluate(queue, seed++);
  await page.waitForFunction(() => window.__ending || window.__look().picture, null, { timeout: 120000 });
  await page.evaluate(() => window.app.api.interrupt(null));
  await page.waitForFunction(() => window.__ending, null, { timeout: 20000 });
  await page.waitForTimeout(300);
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
  await shoot('overruled');
  await page.close();
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
  for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
    window.app.api.addEventListener(kind, event => { window.__ending = [kind, event.detail, performance.now()]; });
  window.app.api.addEventListener('wan_distributed.node', ({ detail }) => {
    if (detail.text) window.__told.push([(performance.now() - window.__queued) / 1000, detail.text]);
  });
}

// Runs in the page.
function look() { return window.__look(); }

// Runs in the page.
function queue(seed) {
  for (const node of window.app.graph._nodes) {
    const widget = node.widgets?.find(widget => widget.name === 'seed');
    if (widget) { widget.value = seed; widget.callback?.(seed); }
  }
  window.__ending = null;
  window.__told = [];
  window.__queued = performance.now();
  window.app.queuePrompt(0, 1);
}
