// A headless Chromium that stays for many visits: node visitor.mjs CHROMIUM PLAYWRIGHT. A line of JSON on stdin is a plan,
// and a line on stdout what came of it.
//
// PLAN: script (of this folder, whose `visit(page, plan)` says what is done), url (of the server), files (folder with the
// version of the page; null: the server's own), vue (the renderer that the page begins with), and what the script asks for.
import readline from 'readline';
import { openPage, startBrowser } from './page.mjs';

const browser = await startBrowser(...process.argv.slice(2));
const open = new Map();
for await (const line of readline.createInterface({ input: process.stdin })) {
  const plan = JSON.parse(line), key = `${plan.url} ${plan.files}`;
  let answer;
  try {
    const { visit } = await import(`./${plan.script}`);
    // A page takes longer to load than most visits.
    if (!open.has(key)) open.set(key, await openPage(browser, plan));
    const { page, errors } = open.get(key);
    // With those of the load, or since the visit before.
    answer = { ...await visit(page, plan), pageErrors: errors.splice(0) };
  } catch (error) {
    answer = { failed: error.stack, pageErrors: open.get(key)?.errors };
    await open.get(key)?.page.close();
    open.delete(key);
  }
  console.log(JSON.stringify(answer));
}
await browser.close();
