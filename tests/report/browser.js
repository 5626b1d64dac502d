// Opens a page from the file system on a laptop and on a phone, and prints what is wrong with it.
const fs = require('fs');
const path = require('path');
const puppeteer = require('puppeteer-core');

const VIEWS = [
  { name: 'laptop, light', width: 1280, scheme: 'light' },
  { name: 'laptop, dark', width: 1280, scheme: 'dark' },
  { name: 'phone, light', width: 390, scheme: 'light' },
  { name: 'phone, dark', width: 390, scheme: 'dark' },
];
const REACHED = 'summary, input, a[href], button, [tabindex="0"]';

// What the Tab key reaches, and what the keys do there: Enter opens the first words, Space shows a picture in full size.
async function keyboard(page) {
  const last = await page.evaluate((chosen) => document.querySelectorAll(chosen).length, REACHED);
  const seen = [];
  let opened = null, enlarged = null;
  for (let n = 0; n < last; n += 1) {
    await page.keyboard.press('Tab');
    const { number, tag, outlined } = await page.evaluate((chosen) => {
      const one = document.activeElement;
      const { outlineStyle } = getComputedStyle(one);
      return { number: [...document.querySelectorAll(chosen)].indexOf(one), tag: one.tagName, outlined: outlineStyle !== 'none' };
    }, REACHED);
    seen.push({ number, outlined });
    if (tag === 'SUMMARY' && opened === null) {
      await page.keyboard.press('Enter');
      opened = await page.evaluate(() => document.activeElement.parentElement.open);
    }
    if (tag === 'INPUT' && enlarged === null) {
      const width = () => page.evaluate(() => document.activeElement.closest('figure').querySelector('img').getBoundingClientRect().width);
      const before = await width();
      await page.keyboard.press('Space');
      enlarged = (await width()) > before;
    }
  }
  return { in_order: seen.every(({ number }, n) => number === n), outlined: seen.every((one) => one.outlined), opened, enlarged };
}

(async () => {
  const [executablePath, file] = process.argv.slice(2);
  const browser = await puppeteer.launch({ executablePath, args: ['--no-sandbox'], headless: true });
  const page = await browser.newPage();
  const errors = [];
  const requests = [];
  page.on('console', (message) => message.type() === 'error' && errors.push(message.text()));
  page.on('pageerror', (error) => errors.push(String(error)));
  page.on('request', (request) => /^(file|data):/.test(request.url()) || requests.push(request.url()));
  const views = [];
  for (const { name, width, scheme } of VIEWS) {
    await page.setViewport({ width, height: 900 });
    await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }]);
    await page.goto('file://' + path.resolve(file), { waitUntil: 'load' });
    await page.evaluate(fs.readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8'));
    const { violations } = await page.evaluate(() => axe.run());
    views.push({
      name,
      violations: violations.map(({ impact, id, nodes }) => ({ impact, id, example: nodes[0].html.slice(0, 200) })),
      broken: await page.evaluate(() => [...document.images].filter((one) => !one.naturalWidth).length),
      wider_than_the_window: await page.evaluate(() => document.documentElement.scrollWidth > window.innerWidth + 1),
    });
  }
  const keys = await keyboard(page);
  console.log(JSON.stringify({ views, errors, requests, keys }));
  await browser.close();
})();
