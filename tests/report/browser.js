// Opens a page from the file system on a laptop and on a phone, and prints what is wrong with it.
const fs = require('fs');
const path = require('path');
const puppeteer = require('puppeteer-core');

const VIEWS = [
  { name: 'laptop, light', width: 1280, scheme: 'light' },
  { name: 'phone, dark', width: 390, scheme: 'dark' },
];

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
  console.log(JSON.stringify({ views, errors, requests }));
  await browser.close();
})();
