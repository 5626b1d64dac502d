// Takes pictures of pages: node pages.js <chromium> <JSON: [{address, width, height, scheme, only, steps, file}]>
// only: what of the page, as a selector; steps: [[action, selector, value]] before it is taken.
const puppeteer = require('puppeteer-core');

const ARGS = ['--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--use-gl=angle', '--use-angle=swiftshader',
  '--enable-unsafe-swiftshader', '--disable-background-networking', '--disable-component-update', '--disable-sync'];
const PATIENCE = 600000;

const DO = {
  ready: (page) => page.waitForFunction(() => document.getElementById('canvas').dataset.ready === 'yes'),
  quiet: (page) => page.waitForFunction(() => !document.getElementById('status').textContent),
  choose: (page, selector, value) => page.select(selector, value),
  open: async (page, selector, value) => {
    await page.$eval('#canvas', (one) => { one.dataset.ready = ''; });
    await page.select(selector, value);
  },
  // the case of a name: its option may say more
  named: async (page, selector, value) => {
    const chosen = await page.$eval(selector, (one, name) => [...one.options].find((each) => each.text.startsWith(name)).value, value);
    await DO.open(page, selector, chosen);
  },
  slide: (page, selector, value) => page.$eval(selector, (one, at) => {
    one.value = at;
    one.dispatchEvent(new Event('input', { bubbles: true }));
  }, value),
  check: (page, selector, value) => page.$eval(selector, (one, on) => one.checked !== (on === 'on') && one.click(), value),
  press: (page, selector, value) => page.focus(selector).then(() => page.keyboard.press(value)),
  remove: (page, selector) => page.$$eval(selector, (all) => all.forEach((one) => one.remove())),
};

(async () => {
  const [executablePath, wanted] = process.argv.slice(2);
  const browser = await puppeteer.launch({ executablePath, args: ARGS, headless: true, protocolTimeout: PATIENCE });
  for (const { address, width, height, scheme, only, steps, file } of JSON.parse(wanted)) {
    const page = await browser.newPage();
    page.setDefaultTimeout(PATIENCE);
    await page.setViewport({ width, height });
    await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme || 'light' }]);
    await page.goto(address, { waitUntil: 'load' });
    for (const [action, selector, value] of steps || []) await DO[action](page, selector, value);
    // what WebGL draws, and what a page fades in
    await new Promise((done) => setTimeout(done, 1500));
    await (only ? await page.$(only) : page).screenshot({ path: file });
    await page.close();
  }
  await browser.close();
})().catch((error) => { console.error(error); process.exit(1); });
