// ComfyUI's page in a headless Chromium, and what every visit to it begins with.
import { randomUUID } from 'crypto';
import fs from 'fs';
import path from 'path';
import { pathToFileURL } from 'url';

// `chromium`: its path; `playwright`: folder of playwright-core.
export async function startBrowser(executablePath, playwright) {
  const { chromium } = await import(pathToFileURL(path.join(playwright, 'index.mjs')));
  return chromium.launch({
    executablePath,
    headless: true,
    args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
      '--disable-background-networking', '--disable-component-update', '--disable-sync'],
  });
}

// ComfyUI's page with all nodes known, in one of its renderers (vue: Nodes 2.0). `files`: folder of another version of
// the page than the server's own. `errors`: what the page throws from now on.
export async function openPage(browser, { url, files, vue }) {
  await fetch(url + '/settings', {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({
      // Without it the Templates dialog covers the canvas on a first visit.
      'Comfy.TutorialCompleted': true,
      'Comfy.VueNodes.Enabled': vue,
      'Comfy.Workflow.ShowMissingModelsWarning': false,
    }),
  });
  const page = await browser.newPage({ viewport: { width: 1600, height: 1000 } }), errors = [];
  page.on('pageerror', error => errors.push(String(error)));
  if (files) await serve(page, files);
  await page.goto(url, { waitUntil: 'domcontentloaded' });
  await until(page,
    () => window.app?.graph && window.app.vueAppReady && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 50,
    90000);
  return { page, errors };
}

// As the server would with --front-end-root: what is a file in `folder` is that file, all else the server's.
async function serve(page, folder) {
  // Chromium does not let a page that came from no address talk to this machine; older ones know of no such permission.
  await page.context().grantPermissions(['local-network-access']).catch(() => {});
  const file = ({ pathname }) => path.join(folder, decodeURIComponent(pathname === '/' ? '/index.html' : pathname));
  await page.route(
    url => Boolean(fs.statSync(file(url), { throwIfNoEntry: false })?.isFile()),
    route => route.fulfill({ path: file(new URL(route.request().url())) }),
  );
}

// Until it holds in the page, which is asked twenty times a second: with every frame it would cost a processor.
export function until(page, condition, timeout, argument = null) {
  return page.waitForFunction(condition, argument, { polling: 50, timeout });
}

export async function set(page, name, value) {
  await page.evaluate(([name, value]) => window.app.extensionManager.setting.set(name, value), [name, value]);
}

// Opens `workflow` (UI format) in that renderer, as one that was not open before: one with the id of another shows what
// was said of that one's nodes.
export async function load(page, workflow, vue) {
  await set(page, 'Comfy.VueNodes.Enabled', vue);
  await page.evaluate(
    workflow => window.app.loadGraphData(workflow, true, true, 'example'), { ...workflow, id: randomUUID() });
  await settled(page);
}

// A picture for people, where they want some.
export async function shoot(page, folder, name) {
  if (!folder) return;
  // The banner about the other renderer would be in it.
  await page.locator('.p-message-close-button, button[aria-label="Close"]').first().click({ timeout: 500 }).catch(() => {});
  await page.screenshot({ path: path.join(folder, `${name}.png`) });
}

// Waits until what the page shows stands still: its nodes, their places and sizes, and its dialogs.
export async function settled(page) {
  await page.evaluate(async () => {
    const shown = () => JSON.stringify([
      window.app.graph._nodes.map(node => [node.id, ...node.pos, ...node.size, node.widgets?.length]),
      [...document.querySelectorAll('[data-node-id], .p-dialog, .comfy-modal, .comfy-markdown')].map(element => {
        const { left, top, width, height } = element.getBoundingClientRect();
        return [left, top, width, height, element.scrollHeight];
      }),
    ]);
    let last = '', same = 0;
    for (let tries = 0; tries < 100 && same < 5; tries++) {
      // Frames, as timers alone may all pass while a busy machine draws nothing.
      await new Promise(resolve => setTimeout(() => requestAnimationFrame(resolve), 80));
      const now = shown();
      same = now === last ? same + 1 : 0;
      last = now;
    }
  });
}
