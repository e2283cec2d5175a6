// What every visit of a headless Chromium to ComfyUI's page begins with.
import path from 'path';
import { pathToFileURL } from 'url';

// PLAN: chromium (its path), playwright (folder of playwright-core).
export async function startBrowser(plan) {
  const { chromium } = await import(pathToFileURL(path.join(plan.playwright, 'index.mjs')));
  return chromium.launch({
    executablePath: plan.chromium,
    headless: true,
    args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
      '--disable-background-networking', '--disable-component-update', '--disable-sync'],
  });
}

// ComfyUI's page with all nodes known, in one of its renderers (vue: Nodes 2.0). What the page throws goes to `errors`.
export async function openPage(browser, url, { vue, errors, offer = false }) {
  await fetch(url + '/settings', {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({
      // Without it the Templates dialog covers the canvas on a first visit.
      'Comfy.TutorialCompleted': true,
      'Comfy.VueNodes.Enabled': vue,
      'Comfy.Workflow.ShowMissingModelsWarning': offer,
    }),
  });
  const page = await browser.newPage({ viewport: { width: 1600, height: 1000 } });
  page.on('pageerror', error => errors.push(String(error)));
  await page.goto(url, { waitUntil: 'domcontentloaded' });
  await page.waitForFunction(
    () => window.app?.graph && window.app.vueAppReady && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 50,
    null, { timeout: 90000 });
  return page;
}

// The banner about the other renderer would be in the pictures.
export async function closeBanner(page) {
  await page.locator('.p-message-close-button, button[aria-label="Close"]').first().click({ timeout: 1000 }).catch(() => {});
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
